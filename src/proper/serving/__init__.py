"""OpenAI-compatible HTTP server (FastAPI, uvicorn) in front of the inference engine. It handles no tensors."""
