"""Adapter storage: the store of per-user records (embedding and LoRA adapter), and the slot caches in front of it."""
