#!/usr/bin/env bash
# Versions: huggingface_hub 2.4.0, Python 3.11.
#
# A server on this machine offers a file of 30 MB, supports byte ranges, and breaks off each answer
# after a fixed number of bytes, as an unsteady line does. hf_hub_download says "Trying to resume
# download..." after each break, and http_get's docstring says that it gives up after 5 attempts if
# no new data was received.
#
# Expected: after a break at 9 MB the next request asks for the rest (Range: bytes=9000000-), so four
#   requests fetch the file. Every request brings 9 MB, so the retries never run out.
# Seen: a block of 10 MiB is written when it is complete; what an answer held beyond the last full
#   block is dropped, and it does not count as data received. With breaks at 9 MB all six
#   requests start at 0, bring 54 MB, and the download fails with no byte kept. With breaks at
#   12 MB, a third more, it succeeds in three requests: the second starts at 10485760, not 12000000.
#   So whether an unsteady line can download anything hangs on one number.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check huggingface_hub==2.4.0

cat > "$work/check.py" <<'PY'
import http.server
import sys
import tempfile
import threading

from huggingface_hub import hf_hub_download

BODY = bytes(range(250)) * 120_000  # 30 MB
starts = []  # the first byte that each GET asked for
limit = 0  # bytes of body after which an answer breaks off


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def begin(self, start):
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(BODY) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        self.end_headers()

    def do_HEAD(self):
        self.begin(0)

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        starts.append(start)
        self.begin(start)
        self.wfile.write(BODY[start : start + limit])
        self.close_connection = True


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{server.server_port}"
seen = {}
for limit in 9_000_000, 12_000_000:
    starts.clear()
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as cache:
        try:
            path = hf_hub_download("owner/name", "tokens.bin", endpoint=address, cache_dir=cache)
            with open(path, "rb") as file:
                end = "downloaded" if file.read() == BODY else "wrong bytes"
        except Exception as error:
            end = type(error).__name__
    seen[limit] = (end, *starts)
    print(f"breaks off after {limit:,} bytes: {end}; requests began at {starts}")

assert seen[9_000_000] == ("RemoteProtocolError", 0, 0, 0, 0, 0, 0)
assert seen[12_000_000] == ("downloaded", 0, 10_485_760, 20_971_520)
PY
NO_PROXY=127.0.0.1 HF_HUB_DISABLE_XET=1 "$work/venv/bin/python" "$work/check.py" "$work"
