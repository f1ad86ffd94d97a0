"""``deepseek monitor``: a run seen live, in the terminal or in a browser, from its log alone."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import threading
import time
import uuid
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any
from urllib.parse import parse_qs, urlsplit

from deepseek.config.errors import UserError
from deepseek.console import say
from deepseek.monitoring.report.page import PLOTLY_PATH, plotly_script, run_page, shell
from deepseek.monitoring.report.patch import difference
from deepseek.monitoring.run_log import RunLog
from deepseek.run_folder import CHECKPOINTS, METRICS_FILE

HOST = "127.0.0.1"
WIDTH_OF_PIPES = 100
SILENT_CLIENT_SECONDS = 10.0
"""After which a connection that asks nothing, or takes nothing, is closed."""
MOST_CLIENTS = 32
"""Connections at once; further ones are closed."""
MOST_VERSIONS = 3
"""Of the page that are kept, for pages that have them; others get it whole."""
PATIENCE = 10
"""The page is made anew at most every so many times as long as making it takes."""


def monitor(
    run: Path, once: bool = False, web: bool = False, port: int = 0, every: float = 2.0
) -> None:
    """Show a run until it ends or Ctrl-C; one that has ended, once. One that has not begun is
    waited for.

    Args:
        run: its folder.
        once: one frame, then return; so it is without a terminal.
        web: serve the report instead, on this machine alone.
        port: of the report; 0: any that is free.
        every: seconds between frames; a browser asks for what is new every fifth time.

    Raises:
        UserError: no run folder, plotly missing, or a port that is taken.
    """
    if every < 0.1:
        raise UserError(f"--every={every:g}: must be at least 0.1 seconds; use 2")
    if not once and _may_begin(run) and not _has_begun(run, every):
        return
    followed = RunLog(run)
    if web:
        _serve(followed, port, every)
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


def _may_begin(run: Path) -> bool:
    """Whether there is no log yet, but a run may begin here: its folder is made, or a person
    looks on who can end the waiting."""
    if (run / METRICS_FILE).is_file():
        return False
    return (run / CHECKPOINTS).is_dir() or (sys.stdout.isatty() and not run.is_file())


def _has_begun(run: Path, every: float) -> bool:
    """Wait until it has; false after Ctrl-C."""
    say(f"waiting      for a run to begin in {run}: it has no {METRICS_FILE} yet; Ctrl-C ends this")
    try:
        while not (run / METRICS_FILE).is_file():
            time.sleep(every)
    except KeyboardInterrupt:
        return False
    return True


def _serve(run: RunLog, port: int, every: float) -> None:
    try:
        server = ReportServer(run, port, every)
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
    """Serves the report of one run on this machine; the page asks it for what is new.

    Args:
        run: its log, which is read on.
        port: 0: any that is free.
        every: seconds; the page asks every fifth time.
    """

    daemon_threads = True
    request_queue_size = MOST_CLIENTS  # with the library's 5, the sixth at once waits for a second

    def __init__(self, run: RunLog, port: int, every: float) -> None:
        super().__init__((HOST, port), _Handler)
        self.seconds = 5 * every
        self._run = run
        self._lock, self._guard = threading.Lock(), threading.Lock()
        self._contents: dict[str, Any] = {}
        """By version, the newest last: what open pages have."""
        self._is_stale, self._due = True, -float("inf")
        self._open: dict[Any, None] = {}

    def news(self, version: str) -> str:
        """JSON: the state of the run and, unless the reader has the newest version, a patch of the
        version that it has; or what is in its way, which may go by."""
        with self._lock:
            try:
                self._renew()
                answer: dict[str, Any] = {"state": self._run.state()}
            except UserError as error:
                return json.dumps({"problem": str(error)})
            contents = dict(self._contents)
        if not contents:
            return json.dumps({"problem": f"{self._run.label} has begun; no step is logged yet"})
        newest = next(reversed(contents))
        if newest != version:
            patch = difference(contents.get(version), contents[newest])
            answer |= {"version": newest, "patch": patch or {"k": {}}}
        return json.dumps(answer, separators=(",", ":"), allow_nan=False)

    def _renew(self) -> None:
        """Make the page anew if the log has grown and the last one is old enough."""
        self._is_stale |= self._run.update()
        begin = time.monotonic()
        if self._is_stale and begin >= self._due and self._run.steps:
            content, self._is_stale = run_page([self._run]).content(), False
            self._contents[uuid.uuid4().hex[:16]] = content
            while len(self._contents) > MOST_VERSIONS:
                del self._contents[next(iter(self._contents))]
            spent = time.monotonic() - begin
            self._due = begin + max(self.seconds, PATIENCE * spent)

    def is_own(self, host: str) -> bool:
        """Whether a request was meant for this server: not one that a foreign page sent here."""
        names = {HOST, "localhost"}
        return host in names | {f"{name}:{self.server_port}" for name in names}

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread; of too many connections the oldest goes, so that none can block others."""
        with self._guard:
            self._open[request] = None
            while len(self._open) > MOST_CLIENTS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with suppress(OSError):
                    oldest.shutdown(SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """The end of a connection."""
        with self._guard:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """That a client goes away, or does not read, is no error here."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    timeout = SILENT_CLIENT_SECONDS

    def do_GET(self) -> None:
        """The page, what is new for it, and plotly: nothing else."""
        address = urlsplit(self.path)
        if not self.server.is_own(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif address.path == "/":
            self._send("text/html", shell(self.server.seconds))
        elif address.path == "/news":
            asked = parse_qs(address.query)
            self._send("application/json", self.server.news(asked.get("version", [""])[0]))
        elif address.path == PLOTLY_PATH:
            self._send("text/javascript", plotly_script(), "private, max-age=86400")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, kind: str, text: str, keeping: str = "no-store") -> None:
        data = text.encode()
        self.send_response(HTTPStatus.OK)
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            data = gzip.compress(data, 5)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", keeping)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are of no interest."""
