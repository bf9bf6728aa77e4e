import torch

from edgeke.data.augment import Normalise
from edgeke.learning.images import resident
from edgeke.learning.predict import predict


def test_images_stay_where_they_are_when_they_do_not_fit_the_accelerator(monkeypatch):
    images = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2 * images.nbytes - 2, 10**9))
    assert resident(images, torch.device("cuda")) is images


def test_large_images_are_predicted_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr("edgeke.learning.images._PIXELS", 3 * 64)
    sizes = []

    def network(images):
        sizes.append(len(images))
        return images.mean((1, 2, 3))[None, :, None]

    network.training, network.eval, network.train = False, lambda: None, lambda mode: None
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    normalise = Normalise((0.5,), (0.25,), torch.device("cpu"))
    logits = predict(network, images, normalise)
    assert sizes == [3, 3, 1]
    torch.testing.assert_close(logits[0, :, 0], normalise(images).mean((1, 2, 3)))
