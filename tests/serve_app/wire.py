"""The network between a process and a server, as something that a test can cut."""

import contextlib
import socket
import threading


class Wire:
    """Hands bytes on between its `port` and a server's. While it is cut nothing arrives on either side, and neither is
    told; what was on its way arrives when it is mended."""

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.whole = threading.Event()
        self.whole.set()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.whole.clear()

    def mend(self) -> None:
        self.whole.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listening.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self.whole.wait()
        server = socket.create_connection(("127.0.0.1", self.server_port))
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):  # one side is gone: the other one hears of it, once the wire is whole
            while data := source.recv(65536):
                self.whole.wait()
                target.sendall(data)
        self.whole.wait()
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.mend()
        self.listening.close()
