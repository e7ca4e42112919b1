"""An OpenAI-compatible server with continuous batching. Every request has its own experts and density.

Only this package imports fastapi, uvicorn, prometheus_client and llguidance.
"""
