import numpy as np
import torch

from mechsub.families.classifier.carrier import CarrierImages, mix_words, open_uniform
from mechsub.families.classifier.config import CarrierConfig


def images(inputs="uniform", members=(0, 1, 2), replicate=0, source=None, **fields):
    config = CarrierConfig(inputs=inputs, num_images=50, **fields)
    return CarrierImages(config, 0, list(members), 6, torch.float32, "cpu", replicate, source)


def numbers(*values, members=3):
    return torch.tensor(values).expand(members, -1)


def test_the_words_are_those_of_splitmix64():
    # The published test vector: seed 1234567, as java.util.SplittableRandom's mixer and its C reference give it.
    found = mix_words(torch.full((3,), 1234567), torch.arange(3))
    assert [word % 2**64 for word in found.tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


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
    keys, counters = torch.zeros(200_000, dtype=torch.int64), torch.arange(200_000)
    uniform = open_uniform(keys, counters, torch.float32)
    assert uniform.min() > -1 and uniform.max() < 1
    assert abs(uniform.mean()) < 0.01 and abs(uniform.var() - 1 / 3) < 0.01
    normal = images("gaussian", scale=2.0).make(numbers(*range(50)))
    assert normal.isfinite().all() and abs(normal.std() - 2.0) < 0.15


def test_real_images_are_drawn_without_repeats_and_shuffled_ones_keep_their_pixels():
    source = torch.arange(60 * 6, dtype=torch.float32).view(60, 6)
    drawn = images("images", source=source).make(numbers(*range(50)))
    assert len(np.unique(drawn[0, :, 0])) == 50
    shuffled = images("shuffled-pixels", source=source).make(numbers(*range(50)))
    assert not torch.equal(shuffled, drawn)
    assert torch.equal(shuffled.sort(-1).values, drawn)
