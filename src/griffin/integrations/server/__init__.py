"""An OpenAI-compatible server with continuous batching, every request with its own experts and density.

The only room that imports fastapi, uvicorn and prometheus_client.
"""
