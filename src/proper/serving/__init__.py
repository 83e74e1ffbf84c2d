"""The HTTP side: an OpenAI-compatible API in front of the engine. Nothing here knows a tensor."""
