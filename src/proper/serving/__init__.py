"""OpenAI-compatible HTTP server (FastAPI, uvicorn) in front of the inference engine. It does not import torch."""
