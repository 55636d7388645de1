"""Rewards of what a diffusion model draws: what is asked of users' own, and the library's."""

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from esscher.adapters.image_rewards import SUSPECT, TELLING, ImageReward
from esscher.errors import UserError
from esscher.exemplars import Mahalanobis, ring, three_of_eight
from esscher.functional.sets import frechet_distance
from esscher.image_rewards import (
    ClassProbability,
    Compressibility,
    EmbeddingSimilarity,
    Frechet,
    FrechetOfEach,
    Vendi,
)

HERE = __name__
ROWS: Any = [{"label": 0, "prompt": "x"}, {"label": 2, "prompt": "y"}]


# ---- users' own, by name


def brightness(images: Any, rows: Any) -> Any:
    return images.flatten(1).mean(-1)


def listed(images: Any, rows: Any) -> Any:
    return [float(row["label"]) for row in rows]


def in_double(images: Any, rows: Any) -> Any:
    return images.double().flatten(1).sum(-1)


def not_a_number(images: Any, rows: Any) -> Any:
    return torch.tensor([1.0, math.nan])


def infinite(images: Any, rows: Any) -> Any:
    return torch.tensor([-math.inf, 1.0])


def one_number(images: Any, rows: Any) -> Any:
    return images.mean()


def a_column(images: Any, rows: Any) -> Any:
    return images.flatten(1).mean(-1, keepdim=True)


def constant(images: Any, rows: Any) -> Any:
    return torch.full((len(images),), 0.5)


def rarely(images: Any, rows: Any) -> Any:
    return (images.flatten(1)[:, 0] > 0.5).float()


def raising(images: Any, rows: Any) -> Any:
    raise RuntimeError("out of paint")


def picky(images: Any, rows: Any) -> Any:
    raise UserError("images must be square")


class Offset:
    def __init__(self, offset: float = 1.0):
        self.offset = offset

    def __call__(self, images: Any, rows: Any) -> Any:
        return brightness(images, rows) + self.offset


class Spread:
    """Of a set: its standard deviation, unless told what to answer instead."""

    def __init__(self, embeds: str = "", answers: str = ""):
        self.embeds, self.answers = embeds, answers

    def embed(self, images: Any, rows: Any) -> Any:
        flat = images.flatten(1)
        return {"": flat, "flat": flat[:, 0], "few": flat[:1], "nan": flat / 0 * 0}[self.embeds]

    def of_set(self, embedding: Any) -> Any:
        if self.answers == "two":
            return embedding.std(0)[:2]
        return embedding.std() / (0 if self.answers == "infinite" else 1)


def reward_of(name: str, decode: Any = lambda x: x, **kwargs: Any) -> ImageReward:
    return ImageReward(f"{HERE}:{name}", kwargs, decode)


def pictures(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_it_is_shown_what_is_decoded_and_the_rows() -> None:
    x = pictures()
    found = reward_of("brightness", lambda x: 1 - x)(x, ROWS)
    torch.testing.assert_close(found, 1 - x.flatten(1).mean(-1))
    assert reward_of("listed")(x, ROWS).tolist() == [0.0, 2.0]
    assert reward_of("in_double")(x, ROWS).dtype == torch.float32


def test_a_class_is_made_first_with_what_it_is_given() -> None:
    x = pictures()
    for kwargs, offset in (({}, 1.0), ({"offset": 3.0}, 3.0)):
        found = reward_of("Offset", **kwargs)(x, ROWS)
        torch.testing.assert_close(found, x.flatten(1).mean(-1) + offset)
    with pytest.raises(UserError, match="cannot be made: .*shift"):
        reward_of("Offset", shift=1.0)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="reward .*nothing.* cannot be imported"):
        reward_of("nothing")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_a_number", "returned nan for an image"),
        ("infinite", "returned -inf for an image"),
        ("one_number", r"must return 2 numbers, one an image, got shape \(\)"),
        ("a_column", r"must return 2 numbers, one an image, got shape \(2, 1\)"),
        ("raising", "failed: RuntimeError.*out of paint"),
        ("picky", "^images must be square$"),
    ],
)
def test_bad_answers_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        reward_of(name)(pictures(), ROWS)


def test_a_constant_reward_is_refused_after_a_thousand_images() -> None:
    reward, rows = reward_of("constant"), [{}] * 100
    with pytest.warns(UserWarning, match="was 0.5 for all of the first 100 images"):
        reward(pictures(100), rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # It is said once.
        for _ in range(TELLING // 100 - 2):
            reward(pictures(100), rows)
    with pytest.raises(UserError, match="was 0.5 for all of the first 1000 images"):
        reward(pictures(100), rows)


def test_a_constant_reward_of_sets_is_refused_after_a_thousand_sets() -> None:
    reward = reward_of("Spread")
    same = torch.ones(4, 3)
    for _ in range(SUSPECT - 1):
        reward.of_set(same)
    with pytest.warns(UserWarning, match="was 0 for all of the first 50 sets"):
        reward.of_set(same)
    for _ in range(TELLING - SUSPECT - 1):
        reward.of_set(same)
    with pytest.raises(UserError, match="was 0 for all of the first 1000 sets"):
        reward.of_set(same)


def test_a_reward_that_changed_once_is_not_constant() -> None:
    reward, rows = reward_of("rarely"), [{}] * 500
    dark = torch.zeros(500, 1, 4, 4)
    reward(torch.cat([dark[:499], dark[:1] + 1]), rows)
    for _ in range(3):
        reward(dark, rows)


def test_one_of_samples_is_not_asked_about_sets_nor_the_other_way_round() -> None:
    of_samples, of_sets = reward_of("brightness"), reward_of("Spread")
    assert of_sets.of_sets and not of_samples.of_sets
    with pytest.raises(UserError, match="judges samples one by one"):
        of_samples.embed(pictures(), ROWS)
    with pytest.raises(UserError, match="judges sets of samples.*use dragon"):
        of_sets(pictures(), ROWS)


def test_a_set_is_embedded_and_judged() -> None:
    x = pictures()
    reward = reward_of("Spread", lambda x: 2 * x)
    embedding = reward.embed(x, ROWS)
    torch.testing.assert_close(embedding, 2 * x.flatten(1))
    assert reward.of_set(embedding) == pytest.approx(float((2 * x).std()))
    assert isinstance(reward.of_set(embedding), float)


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        ("flat", r"must embed 2 images as as many vectors, got shape \(2,\)"),
        ("few", r"must embed 2 images as as many vectors, got shape \(1, 16\)"),
        ("nan", "returned nan for an image"),
    ],
)
def test_bad_embeddings_are_refused(embeds: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        reward_of("Spread", embeds=embeds).embed(pictures(), ROWS)


def test_bad_answers_for_a_set_are_refused() -> None:
    for answers in ("infinite", "two"):
        with pytest.raises(UserError, match="must return a finite number for a set, got"):
            reward_of("Spread", answers=answers).of_set(torch.rand(3, 4))


# ---- of single images


def classifier(images: Any) -> Any:
    """Logits 0, 1 and 2, times an image's mean."""
    return images.flatten(1).mean(-1, keepdim=True) * torch.tensor([0.0, 1.0, 2.0])


def made_classifier() -> Any:
    return classifier


def as_module() -> Any:
    return LINEAR


LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def logp(mean: float, target: int) -> float:
    return mean * target - math.log(1 + math.exp(mean) + math.exp(2 * mean))


@pytest.mark.parametrize("name", ["classifier", "made_classifier"])
def test_probability_of_a_class(name: str) -> None:
    x = pictures()
    means = x.flatten(1).mean(-1).tolist()
    found = ClassProbability(f"{HERE}:{name}", target=1)(x, ROWS)
    assert found.tolist() == pytest.approx([logp(mean, 1) for mean in means], rel=1e-5)
    found = ClassProbability(f"{HERE}:{name}")(x, ROWS)
    assert found.tolist() == pytest.approx([logp(means[0], 0), logp(means[1], 2)], rel=1e-5)
    rows: Any = [{"wanted": 2}, {"wanted": 2}]
    found = ClassProbability(f"{HERE}:{name}", column="wanted")(x, rows)
    assert found.tolist() == pytest.approx([logp(mean, 2) for mean in means], rel=1e-5)


@pytest.mark.parametrize("target", [3, "cat"])
def test_a_class_that_the_classifier_does_not_know_is_refused(target: Any) -> None:
    with pytest.raises(UserError, match=rf"class must be in \[0, 3\).*got '?{target}"):
        ClassProbability(f"{HERE}:classifier")(pictures(), [{"label": target}] * 2)


def test_what_a_reward_reads_of_rows_must_be_there() -> None:
    with pytest.raises(UserError, match="reads the column label of the data, and a row has prompt"):
        ClassProbability(f"{HERE}:classifier")(pictures(), [{"prompt": "a"}] * 2)
    with pytest.raises(UserError, match="reads the column prompt of the data, and a row has none"):
        EmbeddingSimilarity(f"{HERE}:corners", f"{HERE}:letters")(pictures(), [{}, {}])


@pytest.mark.parametrize("name", ["as_module", "LINEAR"])
def test_a_classifier_may_be_a_module_and_gives_gradients(name: str) -> None:
    x = pictures().requires_grad_()
    ClassProbability(f"{HERE}:{name}", target=0)(x, ROWS).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_only_images_have_a_size_as_jpeg() -> None:
    for shape in ((2, 2), (2, 4, 8, 8)):
        with pytest.raises(UserError, match=r"images of 1 or 3 channels.*draws \(2, "):
            Compressibility()(torch.rand(shape), ROWS)


@pytest.mark.parametrize("channels", [1, 3])
def test_size_as_jpeg(channels: int) -> None:
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(1, channels, 16, 16, generator=draw)
    x = torch.cat([noise, torch.full_like(noise, 0.5), 2 * noise])
    found = Compressibility()(x, ROWS)
    array = (noise[0].numpy() * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    picture = array[0] if channels == 1 else np.moveaxis(array, 0, 2)
    Image.fromarray(picture).save(buffer, "JPEG", quality=95)
    assert found[0].item() == pytest.approx(-len(buffer.getvalue()) / 1000)
    assert found[1] > found[0]  # A plain image is small.
    torch.testing.assert_close(Compressibility(sign=-1)(x, ROWS), -found)
    assert Compressibility(quality=10)(x, ROWS)[0] > found[0]


@pytest.mark.parametrize("options", [{"quality": 0}, {"quality": 96}, {"sign": 0}])
def test_bad_settings_of_size_are_refused(options: Any) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Compressibility(**options)


def corners(images: Any) -> Any:
    return images.flatten(1)[:, :2]


def doubled_corners(images: Any) -> Any:
    return 2 * corners(images)


def letters(values: Any) -> Any:
    return torch.tensor([{"x": [2.0, 0.0], "y": [0.0, -1.0]}[value] for value in values])


def test_cosine_with_what_the_row_asks_for() -> None:
    x = torch.zeros(2, 1, 2, 2)
    x[0, 0, 0], x[1, 0, 0] = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    reward = EmbeddingSimilarity(f"{HERE}:corners", f"{HERE}:letters")
    assert reward(x, ROWS).tolist() == pytest.approx([0.6, -1.0])
    renamed: Any = [{"text": "y"}, {"text": "y"}]
    reward = EmbeddingSimilarity(f"{HERE}:corners", f"{HERE}:letters", column="text")
    assert reward(x, renamed).tolist() == pytest.approx([-0.8, -1.0])


# ---- of sets


def exemplars() -> Any:
    """Mean (1, 2), variances 2 and 8 (divided by n - 1): +- sqrt(3) and +- sqrt(12)."""
    one, two = math.sqrt(3.0), math.sqrt(12.0)
    return torch.tensor([[1 + one, 2.0], [1 - one, 2.0], [1.0, 2 + two], [1.0, 2 - two]])


def one_exemplar() -> Any:
    return torch.zeros(1, 2)


def shown() -> Any:
    return pictures(6, seed=3)


def test_frechet_distance_to_exemplars_by_hand() -> None:
    reward = Frechet(f"{HERE}:exemplars")
    # Mean (0, 2), variances 2 / 3 on the first axis alone:
    x = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    embedding = reward.embed(x, ROWS)
    expected = 1 + (math.sqrt(2.0) - math.sqrt(2 / 3)) ** 2 + 8
    assert reward.of_set(embedding).item() == pytest.approx(-expected, rel=1e-5)
    assert reward.of_set(exemplars()).item() == pytest.approx(0, abs=1e-5)


def test_exemplars_are_embedded_as_images_are() -> None:
    reward = Frechet(f"{HERE}:shown", embed=f"{HERE}:corners")
    embedding = reward.embed(shown(), [{}] * 6)
    assert embedding.shape == (6, 2)
    assert reward.of_set(embedding).item() == pytest.approx(0, abs=1e-6)


def test_exemplars_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "embeddings.npy", exemplars().numpy())
    np.save(tmp_path / "images.npy", shown().numpy())
    reward = Frechet(str(tmp_path / "embeddings.npy"))
    assert reward.of_set(exemplars()).item() == pytest.approx(0, abs=1e-5)
    # Embeddings are taken as they are, whatever would embed images; these are embedded.
    reward = Frechet(str(tmp_path / "embeddings.npy"), embed=f"{HERE}:doubled_corners")
    assert reward.of_set(exemplars()).item() == pytest.approx(0, abs=1e-5)
    reward = Frechet(str(tmp_path / "images.npy"), embed=f"{HERE}:doubled_corners")
    assert reward.of_set(2 * corners(shown())).item() == pytest.approx(0, abs=1e-5)
    # So are samples in the plane, which are vectors too, from a function.
    reward = Frechet(f"{HERE}:exemplars", embed=f"{HERE}:doubled_corners")
    assert reward.of_set(2 * exemplars()).item() == pytest.approx(0, abs=1e-4)


def test_exemplars_as_statistics(tmp_path: Path) -> None:
    """As other tools save them: mu and sigma."""
    x = exemplars().double()
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=x.mean(0).numpy(), sigma=np.cov(x.numpy().T))
    reward, other = Frechet(str(path)), Frechet(f"{HERE}:exemplars")
    embedding = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [0.0, 2.5]])
    assert reward.of_set(embedding).item() == pytest.approx(other.of_set(embedding).item())
    np.savez(path, mu=x.mean(0).numpy())
    with pytest.raises(UserError, match="must hold mu and sigma, and have no sigma"):
        Frechet(str(path))
    np.savez(path, mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(UserError, match="mu must have the 2 components of sigma, got shape .3,"):
        Frechet(str(path))
    np.savez(path, mu=np.zeros(2), sigma=np.array([[1.0, 3.0], [0.0, 1.0]]))
    with pytest.raises(UserError, match="sigma: a covariance must be square, symmetric and finite"):
        Frechet(str(path))


def test_large_images_need_no_matrix_of_their_size() -> None:
    """Of 3 x 128 x 128 the covariance would have 2.4 billion entries."""
    reward = Frechet(f"{HERE}:large")
    images = large() + 0.5
    assert reward.of_set(reward.embed(images, ROWS)).item() == pytest.approx(-0.25 * 49_152)


def large() -> torch.Tensor:
    return (
        pictures(4, seed=5).new_tensor([0.1, 0.2, 0.3, 0.5]).view(4, 1, 1, 1).expand(4, 3, 128, 128)
    )


def patches(images: torch.Tensor) -> torch.Tensor:
    """Both components of each point, twice: two embeddings an image."""
    return torch.stack([images, images + torch.tensor([2.0, 0.0])], 1)


def test_frechet_distance_of_each_image() -> None:
    reward = FrechetOfEach(f"{HERE}:exemplars")
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    mean, variance = exemplars().mean(0), exemplars().var(0).sum()
    expected = -((x - mean).square().sum(-1) + variance)
    torch.testing.assert_close(reward(x, ROWS), expected.double(), rtol=1e-6, atol=1e-6)
    # Two embeddings a sample: mean x + (1, 0), covariance 2 along the first axis.
    several = FrechetOfEach(f"{HERE}:exemplars", embed=f"{HERE}:patches")
    there = patches(exemplars()).flatten(0, 1).double()
    own = x[0] + torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    apart = frechet_distance(*own, there.mean(0), there.T.cov())
    assert several(x, ROWS)[0].item() == pytest.approx(-apart.item())
    judged = ImageReward(
        "esscher.image_rewards:FrechetOfEach", {"exemplars": f"{HERE}:exemplars"}, lambda x: x
    )
    assert not judged.of_sets and judged(x, ROWS).shape == (2,)


class Broken:
    def __init__(self) -> None:
        raise ValueError("no such file")


def silent(images: Any, rows: Any) -> None:
    return None


def test_rewards_that_cannot_be_made_or_return_no_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="Broken cannot be made: ValueError.'no such file'"):
        ImageReward(f"{HERE}:Broken", {}, lambda x: x)
    with pytest.raises(UserError, match="must return a tensor or numbers, got NoneType"):
        ImageReward(f"{HERE}:silent", {}, lambda x: x)(pictures(), ROWS)


def test_a_constant_reward_is_spoken_of_at_the_end_however_short_a_run_is() -> None:
    reward = ImageReward("esscher.image_rewards:nearness", {}, lambda x: x)
    reward(torch.zeros(1, 2), ROWS[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.warn_if_constant()  # One image says nothing.
    reward(torch.zeros(2, 2), ROWS)
    with pytest.warns(UserWarning, match="was -1 for all of the first 3 images: nothing can be"):
        reward.warn_if_constant()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.warn_if_constant()  # It is said once.


def test_sets_that_are_too_small_are_refused() -> None:
    with pytest.raises(UserError, match="needs at least 2 samples, got 1"):
        Frechet(f"{HERE}:exemplars").of_set(torch.zeros(1, 2))
    with pytest.raises(UserError, match="needs at least 2 samples, got 1"):
        Vendi().of_set(torch.ones(1, 2))
    with pytest.raises(UserError, match="must be at least 2, got 1"):
        Frechet(f"{HERE}:one_exemplar")


def test_exemplars_that_cannot_be_read_or_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exemplars .*none\.npy cannot be read: .*No such file"):
        Frechet(str(tmp_path / "none.npy"))
    np.save(tmp_path / "broken.npy", np.array([[1.0, 2.0], [3.0, np.nan]]))
    with pytest.raises(UserError, match=r"exemplars .*broken\.npy must be finite"):
        Frechet(str(tmp_path / "broken.npy"))


def test_images_of_another_size_than_the_exemplars_are_refused() -> None:
    with pytest.raises(UserError, match="embedded in 16 dimensions and the exemplars in 2"):
        Frechet(f"{HERE}:exemplars").embed(pictures(), ROWS)


def test_variety_of_a_set() -> None:
    reward = Vendi()
    different = torch.eye(4).view(4, 1, 2, 2)
    embedding = reward.embed(different, [{}] * 4)
    assert reward.of_set(embedding).item() == pytest.approx(4)
    assert reward.of_set(embedding[[0, 0, 1, 1]]).item() == pytest.approx(2)
    assert Vendi(f"{HERE}:corners").embed(pictures(), ROWS).shape == (2, 2)
    # Bright pictures that differ a little are alike by their cosine, and not by their distance.
    bright = 1 + 0.1 * embedding
    assert Vendi().of_set(bright).item() == pytest.approx(1, abs=0.05)
    assert Vendi(bandwidth=0.01).of_set(bright).item() == pytest.approx(4, abs=1e-3)
    with pytest.raises(UserError, match="bandwidth must be >= 0, got -1"):
        Vendi(bandwidth=-1.0)
    with pytest.raises(UserError, match="no direction"):
        ImageReward("esscher.image_rewards:Vendi", {}, lambda x: x).of_set(torch.zeros(3, 2))


def test_rewards_of_sets_are_known_as_such() -> None:
    frechet = {"exemplars": f"{HERE}:exemplars"}
    for name, kwargs in {"Frechet": frechet, "Vendi": {}}.items():
        assert ImageReward(f"esscher.image_rewards:{name}", kwargs, lambda x: x).of_sets
    sized = ImageReward("esscher.image_rewards:Compressibility", {"quality": 50}, lambda x: x)
    assert not sized.of_sets and sized(pictures(), ROWS).shape == (2,)


# ---- exemplars in the plane


def test_three_of_eight_gaussians() -> None:
    x = three_of_eight()
    assert x.shape == (3_000, 2) and torch.equal(x, three_of_eight())
    root = 3 / math.sqrt(2)
    nearest = torch.cdist(x, torch.tensor([[3.0, 0.0], [root, root], [0.0, 3.0]])).argmin(-1)
    assert nearest.bincount().tolist() == pytest.approx([1_000] * 3, abs=10)
    assert ring().means.shape == (8, 2)
    torch.testing.assert_close(x.mean(0), ring(range(3)).means.mean(0), rtol=0, atol=0.05)


def test_distance_of_a_sample_in_the_exemplars_covariance() -> None:
    reward = Mahalanobis(f"{HERE}:exemplars")
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0], [1.0, 6.0], [3.0, 6.0]])
    assert reward(x, [{}] * 4).tolist() == pytest.approx([0, -2, -2, -4], abs=1e-5)
