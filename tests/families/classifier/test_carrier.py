import numpy as np
import torch

from mechsub.families.classifier.carrier import CarrierImages, mix_words, uniform_rows
from mechsub.families.classifier.config import CarrierConfig
from mechsub.families.classifier.data import LabelledImages


def images(inputs="uniform", members=(0, 1, 2), replicate=0, source=None, **fields):
    config = CarrierConfig(inputs=inputs, num_images=50, **fields)
    return CarrierImages(config, 0, list(members), 6, torch.float32, "cpu", replicate, source)


def numbers(*values, members=3):
    return torch.tensor(values).expand(members, -1)


def test_the_words_are_those_of_splitmix64():
    # The published test vector: seed 1234567, as java.util.SplittableRandom's mixer and its C reference give it.
    found = mix_words(torch.full((3,), 1234567), torch.arange(3))
    assert [word % 2**64 for word in found.tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_is_the_upper_bits_of_the_words_however_many_are_made_at_once(monkeypatch):
    keys, starts = torch.tensor([3, -5]), torch.tensor([0, 40])
    words = mix_words(keys[:, None].expand(2, 9), starts[:, None] + torch.arange(9))
    expected = [[((word % 2**64) // 2**41 + 0.5) / 2**22 - 1 for word in row] for row in words.tolist()]
    for at_once in (1, 10, 10_000):
        monkeypatch.setattr("mechsub.families.classifier.carrier._WORDS_AT_ONCE", at_once)
        assert uniform_rows(keys, starts, 9, torch.float64).tolist() == expected


def test_an_image_is_a_function_of_its_number_alone():
    carrier = images()
    together = carrier.make(numbers(4, 9, 30))
    alone = carrier.make(numbers(9))
    assert torch.equal(together[:, 1], alone[:, 0])
    assert torch.equal(images(members=(2,)).make(numbers(9, members=1))[0], alone[2])


def test_members_and_replicates_have_images_of_their_own():
    found = images().make(numbers(*range(50)))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found, images(replicate=1).make(numbers(*range(50))))


def test_shared_images_are_made_once_for_all_members():
    carrier = images(shared=True)
    assert len(carrier.owners) == 1
    assert carrier.make(numbers(*range(50), members=1)).shape == (1, 50, 6)


def test_noise_has_the_moments_it_should():
    uniform = uniform_rows(torch.zeros(200, dtype=torch.int64), torch.arange(200) * 1000, 1000, torch.float32)
    assert uniform.min() > -1 and uniform.max() < 1
    assert abs(uniform.mean()) < 0.01 and abs(uniform.var() - 1 / 3) < 0.01
    normal = images("gaussian", scale=2.0).make(numbers(*range(50)))
    assert normal.isfinite().all() and abs(normal.std() - 2.0) < 0.15


def test_real_images_are_drawn_without_repeats_and_shuffled_ones_keep_their_pixels():
    pixels = (4 * torch.arange(60)[:, None] + torch.arange(6)).to(torch.uint8)
    labels = torch.zeros(60, dtype=torch.int64)
    source = LabelledImages(pixels, labels, pixels, labels, 255.0, torch.float32)
    drawn = images("images", source=source).make(numbers(*range(50)))
    assert len(np.unique(drawn[0].numpy(), axis=0)) == 50
    shuffled = images("shuffled-pixels", source=source).make(numbers(*range(50)))
    assert not torch.equal(shuffled, drawn)
    assert torch.equal(shuffled.sort(-1).values, drawn)
