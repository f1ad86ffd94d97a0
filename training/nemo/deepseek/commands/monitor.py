"""``deepseek monitor``: a run seen live, in the terminal or in a browser, from its log alone."""

from __future__ import annotations

import html
import shutil
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from deepseek.config.errors import UserError
from deepseek.console import say
from deepseek.monitoring.run_log import RunLog
from deepseek.run_folder import METRICS_FILE

HOST = "127.0.0.1"
WIDTH_OF_PIPES = 100


def monitor(
    run: Path, once: bool = False, web: bool = False, port: int = 0, every: float = 2.0
) -> None:
    """Show a run until it ends or Ctrl-C; one that has ended, once.

    Args:
        run: its folder.
        once: one frame, then return; so it is without a terminal.
        web: serve the report instead, on this machine alone.
        port: of the report; 0: any that is free.
        every: seconds between frames; the report is made anew at most every 15 of them.

    Raises:
        UserError: no run folder, plotly missing, or a port that is taken.
    """
    if every < 0.1:
        raise UserError(f"--every={every:g}: must be at least 0.1 seconds; use 2")
    followed = RunLog(run)
    if web:
        _serve(run, port, 15 * every)
        return
    from rich.live import Live

    from deepseek.monitoring.live import frame, plain

    width = shutil.get_terminal_size((WIDTH_OF_PIPES, 24)).columns
    if once or not sys.stdout.isatty():
        say(plain(frame(followed, width=width), width).rstrip())
        return
    # rich, not textual: a frame has nothing to click on, and rich is there already.
    try:
        with Live(frame(followed, width=width), screen=True, auto_refresh=False) as live:
            while not followed.has_ended:
                time.sleep(every)
                followed.update()
                width = live.console.width
                live.update(frame(followed, width=width), refresh=True)
    except KeyboardInterrupt:
        pass
    say(plain(frame(followed, width=width), width).rstrip())


def _serve(run: Path, port: int, seconds: float) -> None:
    try:
        server = ReportServer(run, port, seconds)
    except OSError as error:
        raise UserError(
            f"cannot listen on {HOST}:{port}: {error.strerror}; choose another with --port"
        ) from error
    say(f"serving      http://{HOST}:{server.server_port}/ until Ctrl-C")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


class ReportServer(ThreadingHTTPServer):
    """Serves the report of one run on this machine; a browser that shows it loads it again.

    Args:
        run: its folder.
        port: 0: any that is free.
        seconds: how old a page may become while the log grows.
    """

    daemon_threads = True

    def __init__(self, run: Path, port: int, seconds: float) -> None:
        super().__init__((HOST, port), _Handler)
        self.run = run
        self.seconds = seconds
        self._lock = threading.Lock()
        self._page = b""
        self._made = -float("inf")
        self._size = -1

    def page(self) -> bytes:
        """The newest page; made anew if the log has grown and the last one is old enough."""
        with self._lock:
            size = _size(self.run / METRICS_FILE)
            if size != self._size and time.monotonic() - self._made >= self.seconds:
                self._page = _report(self.run)
                self._made, self._size = time.monotonic(), size
            return self._page

    def is_own(self, host: str) -> bool:
        """Whether a request was meant for this server: not one that a foreign page sent here."""
        names = {HOST, "localhost"}
        return host in names | {f"{name}:{self.server_port}" for name in names}


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        """The page, and nothing else."""
        if not self.server.is_own(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        if self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        page = self.server.page()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Refresh", str(max(1, round(self.server.seconds))))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are of no interest."""


def _report(run: Path) -> bytes:
    """The page, or in its place what is in its way: the next try may find it gone."""
    from deepseek.monitoring.report.page import report_page
    from deepseek.monitoring.run_log import read_run

    try:
        return report_page([read_run(run)]).encode()
    except UserError as error:
        return f"<!doctype html><meta charset=utf-8><p>{html.escape(str(error))}".encode()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
