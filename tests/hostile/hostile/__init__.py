"""Hand-ins that attack the grader, and what becomes of them in ours (`arena.py`) and in stock nbgrader (`stock.py`)."""
