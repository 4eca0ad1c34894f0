"""The few WebDriver commands that the browser test needs, for Debian's chromium-driver."""

import base64
import shutil
import socket
import subprocess
import time

import httpx

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--force-color-profile=srgb"]
MISSING = "Debian's chromium and chromium-driver are not installed here (apt-get install chromium chromium-driver)."


def is_installed():
    return bool(shutil.which("chromedriver") and shutil.which("chromium"))


class Browser:
    """A headless Chromium. Use it as a context."""

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        for _ in range(300):
            try:
                self.client.get("/status")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        wanted = {"alwaysMatch": {"goog:chromeOptions": {"args": OPTIONS}, "timeouts": {"script": 60_000}}}
        self.session = "/session"
        self.session += "/" + self.post("", capabilities=wanted)["sessionId"]
        return self

    def __exit__(self, *_):
        self.client.delete(self.session)
        self.process.terminate()
        self.process.wait(30)

    def post(self, command, **body):
        answer = self.client.post(self.session + command, json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url):
        self.post("/url", url=url)

    def size(self, width, height):
        self.post("/window/rect", width=width, height=height)

    def run(self, script, *arguments):
        """What a script returns; it may return a promise."""
        return self.post("/execute/sync", script=script, args=list(arguments))

    def element(self, selector):
        return self.post("/element", using="css selector", value=selector)[ELEMENT]

    def type(self, selector, text):
        self.post(f"/element/{self.element(selector)}/value", text=text)

    def click(self, selector):
        self.run("document.querySelector(arguments[0]).scrollIntoView({ block: 'center' })", selector)
        self.post(f"/element/{self.element(selector)}/click")

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def wait_for(self, script, *arguments, seconds=400):
        until = time.monotonic() + seconds
        while not self.run(script, *arguments):
            assert time.monotonic() < until, (script, self.text("#status"), self.text("#error"))
            time.sleep(0.1)

    def screenshot(self, file):
        file.write_bytes(base64.b64decode(self.client.get(self.session + "/screenshot").json()["value"]))
