"""The tools: the plan, and what a notebook shows."""
