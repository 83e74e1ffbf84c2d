"""Trained parts for other programs: PEFT folders, user archives, static and 8-bit forms of the adapters."""
