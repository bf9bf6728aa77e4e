"""Features and pictures to bytes and back, and what is refused."""

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from edgeke.device.codec import (
    Codec,
    decode,
    decode_picture,
    encode,
    encode_picture,
    kept_positions,
    parse_codec,
)
from edgeke.errors import InputError

NAMES = ("f32", "f16", "q8", "q6", "q4", "q2", "q4_r50", "q8_r25", "f32_r10")
SHAPES = ((1, 64, 4, 4), (3, 5, 7, 3), (2, 12, 1, 1), (1, 1, 9, 9))


def features(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1, shape).astype(np.float32)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_what_travels_comes_back_as_near_as_its_bits_allow(name, shape, pack):
    codec, sent = parse_codec(name), features(shape)
    received = decode(encode(sent, codec, pack), shape[1:], 3)
    assert received.shape == sent.shape
    assert received.dtype == np.float32
    assert codec.name == name
    group = np.gcd(shape[1], 8)
    rows, back = (x.reshape(shape[0], -1, group, shape[2] * shape[3]) for x in (sent, received))
    if codec.share == 1:
        spans = np.ptp(rows, axis=(2, 3), keepdims=True)
        limit = spans / 2 ** (codec.bits + 1 if codec.bits < 16 else 10)
        limit = spans / (2**codec.bits - 1) / 2 if codec.bits <= 8 else limit
        assert (np.abs(rows - back) <= (0 if codec.bits == 32 else limit * 1.001 + 1e-6)).all()
        return
    kept = kept_positions(shape[2] * shape[3], codec.share)
    energy = (sent**2).sum(axis=1).reshape(shape[0], -1)
    for image in range(shape[0]):
        top = np.argsort(energy[image])[-kept:]
        rest = np.setdiff1d(np.arange(energy.shape[1]), top)
        one, other = (x[image].reshape(shape[1], -1) for x in (sent, received))
        coarse = np.ptp(one) / (2 ** min(codec.bits, 8) - 1) / 2 + 1e-5
        assert np.abs(one[:, top] - other[:, top]).max() <= coarse
        if len(rest):  # of these only the mean travels
            assert np.abs(one[:, rest].mean(axis=1) - other[:, rest].mean(axis=1)).max() <= coarse
            assert np.ptp(other[:, rest], axis=1).max() == 0


def test_sizes_are_what_the_bits_say():
    sent = features((1, 64, 8, 8))
    lengths = {name: len(encode(sent, parse_codec(name))) for name in NAMES}
    header, ranges, values = 24, 8 * 8, 64 * 64
    assert lengths["f32"] == header + 4 * values
    assert lengths["f16"] == header + 2 * values
    assert lengths["q8"] == header + ranges + values
    assert lengths["q6"] == header + ranges + values * 6 // 8
    assert lengths["q4"] == header + ranges + values // 2
    assert lengths["q2"] == header + ranges + values // 4
    assert lengths["q4_r50"] == header + 8 + ranges + 33 * 64 // 2
    sparse = np.maximum(sent - 1, 0)
    assert len(encode(sparse, Codec(4), True)) < 0.8 * len(encode(sparse, Codec(4)))


def test_constant_and_extreme_features_survive():
    for value in (0.0, -3.5, 3e38):
        sent = np.full((1, 8, 2, 2), value, np.float32)
        assert np.array_equal(decode(encode(sent, Codec(4)), (8, 2, 2), 1), sent)
    wide = np.array([-3e38, 3e38] * 16, np.float32).reshape(1, 8, 2, 2)
    with pytest.raises(InputError, match="not finite"):
        encode(wide, Codec(8))
    wide = wide / 2
    assert np.allclose(decode(encode(wide, Codec(8)), (8, 2, 2), 1), wide, rtol=1e-2)
    assert np.abs(decode(encode(wide, Codec(16)), (8, 2, 2), 1)).max() == 65504
    for bad in (np.nan, np.inf):
        for codec in (Codec(4), Codec(32), Codec(16, 0.5)):
            sent = features((1, 8, 2, 2))
            sent[0, 3, 1, 1] = bad
            with pytest.raises(InputError, match="not finite"):
                encode(sent, codec)


@pytest.mark.parametrize("name", ["q5", "f8", "q4_r0", "q4_r100", "q4_r5x", "raw", "", "q4_r050"])
def test_unknown_names_are_refused(name):
    with pytest.raises(InputError, match="is no codec"):
        parse_codec(name)


def test_a_bomb_is_refused_before_memory_is_taken():
    sent = encode(features((1, 8, 4, 4)), Codec(8), True)
    bomb = sent[:24] + zlib.compress(bytes(20_000_000), 1)
    long = struct.pack("<4sBBHIHHHHI", b"EKF1", 8, 0, 8, 9, 60_000, 60_000, 3, 3, 2**32 - 1)
    many = struct.pack("<4sBBHIHHHHI", b"EKF1", 8, 0, 8, 16, 60_000, 8, 4, 4, 60_000 * 136)
    tracemalloc.start()
    try:
        for message in (bomb, long, many):
            with pytest.raises(InputError):
                decode(message, (8, 4, 4), 4)
        with pytest.raises(InputError):
            decode_picture(sent[:8] + bomb, (4, 4, 1))
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


def test_whatever_is_malformed_is_refused_or_harmless():
    dice = random.Random(0)
    picture = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    messages = [encode(features((2, 6, 3, 3)), parse_codec(n), p) for n in NAMES for p in (0, 1)]
    refused = 0
    for number in range(5_000):
        message = bytearray(messages[number % len(messages)])
        for _ in range(dice.choice((1, 1, 2, 8))):
            how = dice.randrange(4)
            place = dice.randrange(len(message)) if message else 0
            if how == 0:
                message = message[:place]
            elif how == 1:
                message += dice.randbytes(dice.randrange(1, 9))
            elif message:
                place = place if how == 2 else min(place, 23)
                message[place] = dice.randrange(256)
        try:
            received = decode(bytes(message), (6, 3, 3), 2)
        except InputError:
            refused += 1
        else:
            assert received.shape[1:] == (6, 3, 3)
            assert len(received) in (1, 2)
            assert np.isfinite(received).all()
    assert refused > 2_500
    png = encode_picture(picture)
    for place in range(len(png)):
        for changed in (png[:place], png[:place] + bytes([png[place] ^ 1]) + png[place + 1 :]):
            with pytest.raises(InputError):
                decode_picture(changed, picture.shape)


@pytest.mark.parametrize("shape", [(16, 16, 1), (9, 5, 3), (1, 1, 3), (64, 48, 3)])
def test_pictures_travel_as_png_without_loss(shape):
    rows = np.linspace(0, 255, shape[0])[:, None, None]
    noise = np.random.default_rng(0).integers(0, 9, shape)
    image = (rows * np.ones(shape) % 240 + noise).astype(np.uint8)
    png = encode_picture(image)
    assert np.array_equal(decode_picture(png, shape), image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))).reshape(shape), image)
    other = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if shape[2] == 1 else image).save(other, "PNG")
    assert len(png) < 1.2 * len(other.getvalue()) + 20
