"""Training of control models, and the small world in which their effect can be seen."""
