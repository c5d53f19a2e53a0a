"""How good a model is: tasks of lm-evaluation-harness and of GLM-130B's authors, and what packing
costs. A model is asked through its scorer."""
