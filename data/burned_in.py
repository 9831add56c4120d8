"""Text that was burned into the pixels: patient banners, dates, annotations.

RapidOCR (PaddleOCR's detector and reader as ONNX, both inside its wheel, Apache-2.0) finds and reads it without a
network. What it reads decides one thing, whether a box is text at all, and is never kept, logged or returned.
"""

import functools
from typing import Any

import numpy as np

from tiger.conditions import Gray
from tiger.errors import InputError

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, the last two exclusive

# A lesion can look like one huge letter to the detector: a box as high as this that the reader makes nothing of is no
# text. Measured in tests/test_dicom.py on ultrasound with and without rendered text.
LETTER_PX = 28
READ_SCORE = 0.6
MARGIN_PX = 3  # antialiasing and JPEG reach beyond a letter's box


@functools.cache
def _reader() -> Any:
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise InputError(
            "finding burned-in text needs the package rapidocr-onnxruntime (Python below 3.13): "
            "pip install rapidocr-onnxruntime, or give --text keep for images known to bear none"
        ) from error
    return RapidOCR(det_limit_type="min", intra_op_num_threads=1, inter_op_num_threads=1)


def text_boxes(gray: Gray) -> list[Box]:
    """Where an HxW uint8 image bears text; letters of 9 px and more are found, one word or marker to a box.

    Raises InputError where the package is missing.
    """
    height, width = gray.shape
    found, _ = _reader()(np.repeat(gray[:, :, None], 3, axis=2), use_cls=False, text_score=0.0)
    boxes = []
    for corners, _, score in found or ():
        (x0, y0), (x1, y1) = np.min(corners, axis=0), np.max(corners, axis=0)
        if min(x1 - x0, y1 - y0) < LETTER_PX or float(score) >= READ_SCORE:
            left, top = max(0, int(x0) - MARGIN_PX), max(0, int(y0) - MARGIN_PX)
            right, bottom = min(width, int(np.ceil(x1)) + MARGIN_PX), min(height, int(np.ceil(y1)) + MARGIN_PX)
            boxes.append((left, top, right, bottom))
    return boxes


def blacken(gray: Gray, boxes: list[Box]) -> Gray:
    """A copy of the image with the boxes painted black."""
    clean = gray.copy()
    for x0, y0, x1, y1 in boxes:
        clean[y0:y1, x0:x1] = 0
    return clean
