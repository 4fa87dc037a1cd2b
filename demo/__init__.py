"""What LLM.int8() is for, on a real language model: ``make demo`` or ``python -m demo``."""
