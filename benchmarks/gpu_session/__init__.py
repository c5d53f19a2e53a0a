"""All that needs a GPU, in one command, for a machine that is there for minutes only.

steps.py says what is run and in which order, session.py runs it.
"""
