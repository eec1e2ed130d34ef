"""The network between processes and a server, as something that a test can cut."""

import contextlib
import socket
import threading


class Wire:
    """Hands bytes on between its `port` and a server's. Once it is cut nothing arrives on either side, and neither is
    told; what was on its way arrives when it is mended. Used as a context manager."""

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.whole = threading.Event()
        self.whole.set()
        self.before: bytes | None = None
        self.was_cut = threading.Event()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_before(self, sent: bytes) -> None:
        """Cuts it when a client next sends this: that is the first to be held."""
        self.before = sent

    def mend(self) -> None:
        self.whole.set()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.mend()
        self.listening.shutdown(socket.SHUT_RDWR)  # which wakes who accepts
        self.listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listening.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self.whole.wait()
        with contextlib.suppress(OSError):
            server = socket.create_connection(("127.0.0.1", self.server_port))
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):  # one side is gone: the other one hears of it, once the wire is whole
            while data := source.recv(65536):
                if self.before is not None and self.before in data:
                    self.before = None
                    self.whole.clear()
                    self.was_cut.set()
                self.whole.wait()
                target.sendall(data)
        self.whole.wait()
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
