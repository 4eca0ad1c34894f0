"""HTTP service. Needs the ``serve`` extra; without it the import itself says so."""

from importlib.util import find_spec

from packshot.errors import PackshotError

_EXTRA = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
_missing = [name for name in _EXTRA if find_spec(name) is None]
if _missing:
    raise PackshotError(f"Serving needs {', '.join(_missing)}, not installed here.", "pip install packshot[serve]")
