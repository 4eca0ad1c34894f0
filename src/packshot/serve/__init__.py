"""Generation over HTTP: the service, its queue, its page and its metrics.

It needs the ``serve`` extra; without it, the import raises an error that names what is missing.
"""

from importlib.util import find_spec

from packshot.errors import PackshotError

missing = [name for name in ("fastapi", "uvicorn", "prometheus_client", "python_multipart") if find_spec(name) is None]
if missing:
    raise PackshotError(f"Serving needs {', '.join(missing)}, not installed here.", "pip install packshot[serve]")
