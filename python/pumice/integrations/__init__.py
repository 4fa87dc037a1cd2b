"""Other libraries' models and checkpoint formats."""
