"""An HTTP server that speaks OpenAI's protocol, for one model. It needs `pip install bminf[serve]`.

Requests come in as JSON and are checked (bodies.py), become rows (choice.py) of an engine that one
thread owns (worker.py), and go out as they come, or as a whole (replies.py, sending.py).
"""
