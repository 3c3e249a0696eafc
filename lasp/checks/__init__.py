"""What ranks compare before they exchange and before an optimizer steps, so that no difference passes in silence.

Also how a model is tried and left as it was (`untouched.py`).
"""
