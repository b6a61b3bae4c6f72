"""With this folder on PYTHONPATH, Python resolves *.web.test to loopback: a web of many hosts without a network."""
import socket

_resolve = socket.getaddrinfo


def getaddrinfo(host, *arguments, **options):
    """What the system answers, or 127.0.0.1 for a host of the stub's web."""
    is_stub = isinstance(host, str) and host.endswith(".web.test")
    return _resolve("127.0.0.1" if is_stub else host, *arguments, **options)


socket.getaddrinfo = getaddrinfo
