"""How fast are images read from an object store, next to the same files over plain HTTP? `make bench-stores` runs it.

    python tests/bench_stores.py [--rows 2000] [--wait-ms 20]

A loopback server that answers each GET after the same wait, whether it is asked as S3 (path style, the signature is not
looked at) or as a web server; dry runs of this script over both. The server's share of the cores is in both numbers.
"""
import argparse
import asyncio
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from bench_web import write_images

ROOT = pathlib.Path(__file__).resolve().parent.parent
LISTED = (b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>1</KeyCount><Contents>'
          b"<Key>images/0.jpg</Key><Size>1</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
          b"</Contents></ListBucketResult>")


async def serve(folder, wait_s):
    """Answer every GET of /bucket/images/N... with an image; tell the port on stdout."""
    images = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]

    async def answer(reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                path = head.split(b" ")[1].decode()
                await asyncio.sleep(wait_s)
                is_list = "list-type" in path or "prefix=" in path
                body = LISTED if is_list else images[int(path.partition("images/")[2].partition(".")[0]) % len(images)]
                kind = "application/xml" if is_list else "image/jpeg"
                start = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nETag: \"x\"\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(start.encode() + (b"" if head.startswith(b"HEAD") else body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            pass
        writer.close()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def run(table, image_path, folder, environment):
    """Pairs per second of a dry run."""
    keys = {"csv_path": table, "image_path": image_path, "pretrained_model": "none", "output_path": folder / "scores",
            "allow_private_hosts": "true", "max_per_host": 1024}
    command = [sys.executable, str(ROOT / "image_text_sim_clip.py"), "--config", str(ROOT / "config.yaml"), "--fresh"]
    for key, value in keys.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    profile = json.loads((folder / "scores/profile.json").read_text())
    assert profile["scored"] == profile["rows"], profile["failed"]
    return profile["pairs_per_s"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--wait-ms", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--serve", type=pathlib.Path)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve, options.wait_ms / 1000))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_images(folder)
        server = subprocess.Popen([sys.executable, __file__, "--serve", str(folder), "--wait-ms", str(options.wait_ms)],
                                  stdout=subprocess.PIPE, text=True)
        place = f"http://127.0.0.1:{int(server.stdout.readline())}"
        environment = os.environ | {"AWS_ENDPOINT_URL": place, "AWS_ACCESS_KEY_ID": "nobody",
                                    "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}
        for kind, first in (("urls", f"{place}/bucket/images/"), ("keys", "")):
            lines = "".join(f"{first}{number}.jpg,a caption\n" for number in range(options.rows))
            (folder / f"{kind}.csv").write_text("url,caption\n" + lines)
        rates = {"http": [], "s3": []}
        for _ in range(options.rounds):
            rates["http"].append(run(folder / "urls.csv", "url", folder, environment))
            rates["s3"].append(run(folder / "keys.csv", "s3://bucket/images", folder, environment))
        server.kill()
    for kind, measured in rates.items():
        print(f"{kind:>5}: {', '.join(f'{rate:,.0f}' for rate in measured)} images/s")
    print(f"ratio: {max(rates['s3']) / max(rates['http']):.2f}")


if __name__ == "__main__":
    main()
