"""What the server writes to stderr: lines of text, or with `--log-format json` one JSON object a line."""

from __future__ import annotations

import copy
import json
import logging
import logging.config
import sys
from datetime import UTC, datetime
from typing import Any

import uvicorn

logger = logging.getLogger("griffin.server")


class JsonFormatter(logging.Formatter):
    """Writes a record as a JSON object on one line: time, level, logger, message, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Log:
    """The server's log.

    Args:
        form: `text` or `json`.
    """

    def __init__(self, form: str = "text") -> None:
        self._json = form == "json"
        if not self._json:
            return
        handler = {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": "json"}
        logging.config.dictConfig(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "formatters": {"json": {"()": JsonFormatter}},
                "handlers": {"stderr": handler},
                "root": {"handlers": ["stderr"], "level": "WARNING"},
                "loggers": {logger.name: {"level": "INFO"}},
            }
        )

    @property
    def for_uvicorn(self) -> dict[str, Any] | None:
        """Uvicorn's own log settings; `None` where it writes through this log."""
        if self._json:
            return None
        settings = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
        settings["handlers"]["access"]["stream"] = "ext://sys.stderr"  # keep stdout free for text
        return settings

    def say(self, message: str) -> None:
        """Tell how far the start is."""
        if self._json:
            logger.info(message)
        else:
            print(message, file=sys.stderr, flush=True)


def log_request(method: str, path: str, status: int, seconds: float) -> None:
    """Log an answered request. The text log leaves these out."""
    if logger.isEnabledFor(logging.INFO):
        fields = {"method": method, "path": path, "status": status, "seconds": round(seconds, 6)}
        logger.info("%s %s %d", method, path, status, extra={"fields": fields})
