"""The server: HTTP and WebSocket in the process of the engine. Only it and the runner of jobs know asyncio."""
