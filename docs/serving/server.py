"""Class probabilities of photos over HTTP, from an ONNX file that `depthfuse export` wrote.

    MODEL=photos.onnx uvicorn --app-dir docs/serving server:app --port 8000
    curl --data-binary @photo.jpg http://localhost:8000/classify

Needs fastapi, uvicorn, onnxruntime, pillow and numpy, and neither depthfuse nor torch.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import onnxruntime
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image, ImageOps

MAX_BYTES = 20 * 2**20
FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow opens others by foreign programs
TOP = 5


class Classifier:
    """The model and what its file says of its input. Calls from several threads are fine."""

    def __init__(self, path: str, threads: int = 0, crop_pct: float = 1.0):
        """threads: of ONNX Runtime; 0 for all cores. crop_pct: share of the resized image that is kept."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry(
            "session.force_spinning_stop", "1"
        )  # leaves the cores to the next image
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        facts = json.loads(self.session.get_modelmeta().custom_metadata_map["depthfuse"])
        self.channels, self.size, width = facts["input_size"]
        if self.size != width:
            raise ValueError(f"{path} takes {self.size} x {width} pixels: only squares are prepared here")
        self.mean = np.float32(facts["mean"] or [0.0] * self.channels)
        self.std = np.float32(facts["std"] or [1.0] * self.channels)
        self.classes, self.crop_pct = facts["classes"], crop_pct
        self.input = self.session.get_inputs()[0].name

    def prepared(self, image: Image.Image) -> np.ndarray:  # [1, C, S, S] float32
        """The shorter side resized, the centre cut out, normalised: as images are evaluated in a run."""
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:  # shows white
            above = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
        image = image.convert("L" if self.channels == 1 else "RGB")
        shorter = math.floor(self.size / self.crop_pct)
        width, height = (int(shorter * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = np.asarray(image, np.float32).reshape(self.size, self.size, self.channels) / 255
        return ((pixels - self.mean) / self.std).transpose(2, 0, 1)[None]

    def __call__(self, image: Image.Image) -> dict[str, float]:
        """{class: probability}, the most likely first."""
        (logits,) = self.session.run(None, {self.input: self.prepared(image)})[0]
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares)[:TOP]
        return {self.classes[i] if self.classes else str(i): float(shares[i]) for i in best}


@asynccontextmanager
async def started(app: FastAPI) -> AsyncIterator[None]:
    path, threads = os.environ["MODEL"], int(os.environ.get("THREADS", "0"))
    app.state.classifier = Classifier(path, threads, float(os.environ.get("CROP_PCT", "1.0")))
    yield


app = FastAPI(title="depthfuse", lifespan=started)


@app.get("/health")
def health() -> dict[str, Any]:
    return {"ready": True}


@app.post("/classify")
async def classify(request: Request) -> dict[str, float]:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BYTES:
            raise HTTPException(413, f"the photo is larger than {MAX_BYTES} bytes")
    return await run_in_threadpool(answer, data)


def answer(data: bytes) -> dict[str, float]:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(400, f"this is no whole {', '.join(FORMATS)} image") from error
    return app.state.classifier(image)
