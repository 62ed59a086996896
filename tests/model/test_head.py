"""The head against its equations written out, and what holds for all four attention variants."""

import math

import pytest
import torch
from torch.nn import functional

from degmix import DeGMixHead
from degmix.model.mixer import Offsets
from degmix_kernels import use_backend
from degmix_kernels.testing import assert_close, relative_l2

ATTENTIONS = ("released", "pixel", "linear", "global")
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)
NYUD = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_head(attention: str, tasks: int = 2, depth: int = 1, dim: int = 8) -> DeGMixHead:
    """In fp64, with every parameter and statistic random: nothing hides behind a zero."""
    names = {f"task{index}": index + 1 for index in range(tasks)}
    head = DeGMixHead((3, 4, 5, 4), names, attention=attention, depth=depth, dim=dim, heads=2).double()
    for seed, (name, tensor) in enumerate(head.state_dict().items()):
        if tensor.is_floating_point():
            value = draw(*tensor.shape, seed=seed)
            if name.endswith("running_var"):
                value = value.abs() + 0.5
            elif tensor.dim() > 1:
                value = value / math.sqrt(tensor[0].numel())
            tensor.copy_(value)
    return head


def small_features(batch: int = 2, height: int = 7, width: int = 9, seed: int = 0) -> list[torch.Tensor]:
    sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(4)]
    shapes = zip((3, 4, 5, 4), sizes, strict=True)
    return [draw(batch, channels, *size, seed=seed + channels) for channels, size in shapes]


class Formula:
    """SPEC in einsum and loops, from a head's state dict alone."""

    def __init__(self, head: DeGMixHead, attention: str) -> None:
        self.weights, self.attention = head.state_dict(), attention
        self.tasks = list(head.predictions)

    def linear(self, name, x):
        return torch.einsum("oi,...i->...o", self.weights[f"{name}.weight"], x) + self.weights[f"{name}.bias"]

    def layer_norm(self, name, x):
        normed = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return normed * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def batch_norm(self, name, x):
        mean, var, scale, shift = (
            self.weights[f"{name}.{leaf}"].view(-1, 1, 1)
            for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift

    def gelu(self, x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def embed(self, features):
        size = features[0].shape[2:]
        maps = [functional.interpolate(f, size=size, mode="bilinear", align_corners=False) for f in features]
        x = torch.cat(maps, 1)
        if self.attention != "linear":
            return self.layer_norm("embed.norm", self.linear("embed.linear", x.movedim(1, -1))).movedim(-1, 1)
        height, width = (math.ceil(side / 4) for side in size)
        padded = x.new_zeros(x.shape[0], x.shape[1], 4 * height, 4 * width)
        padded[:, :, : size[0], : size[1]] = x
        patches = padded.unflatten(3, (width, 4)).unflatten(2, (height, 4))  # (B, C, h, 4, w, 4)
        projected = torch.einsum("ocij,bchiwj->bhwo", self.weights["embed.projection.weight"], patches)
        return self.layer_norm("embed.norm", projected + self.weights["embed.projection.bias"]).movedim(-1, 1)

    def sample(self, plane, y, x):
        """Bilinear sample of one (H, W) plane, zero outside."""
        height, width = plane.shape
        if not (-1 < y < height and -1 < x < width):
            return 0.0
        low_y, low_x, total = math.floor(y), math.floor(x), 0.0
        for row, column in ((low_y, low_x), (low_y, low_x + 1), (low_y + 1, low_x), (low_y + 1, low_x + 1)):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row, column].item()
        return total

    def mixer_layer(self, name, x):
        w = self.weights
        mixed = torch.einsum("oc,bchw->bohw", w[f"{name}.channel_mix.weight"][:, :, 0, 0], x)
        x = self.gelu(mixed + w[f"{name}.channel_mix.bias"].view(-1, 1, 1))
        x = self.batch_norm(f"{name}.channel_mix.norm", x)
        p = functional.conv2d(
            x, w[f"{name}.offsets.p_conv.weight"], w[f"{name}.offsets.p_conv.bias"], padding=1
        )
        batch, channels, height, width = x.shape
        rows, columns = (-1, -1, -1, 0, 0, 0, 1, 1, 1), (-1, 0, 1, -1, 0, 1, -1, 0, 1)
        for k in range(9):
            for i in range(height):
                p[:, k, i, :] += i + 1 + rows[k]
            for j in range(width):
                p[:, 9 + k, :, j] += j + 1 + columns[k]
        weight, bias = w[f"{name}.offsets.opt.weight"], w[f"{name}.offsets.opt.bias"]
        halves = [
            functional.conv2d(half, part, bias_part, padding=1)
            for half, part, bias_part in zip(p.chunk(2, 1), weight.chunk(2), bias.chunk(2), strict=True)
        ]
        offset = torch.cat(halves, 1)
        sampled = torch.zeros_like(x)
        for b in range(batch):
            for c in range(channels):
                for i in range(height):
                    for j in range(width):
                        dy, dx = offset[b, 2 * c, i, j].item(), offset[b, 2 * c + 1, i, j].item()
                        sampled[b, c, i, j] = self.sample(x[b, c], i + dy, j + dx)
        deformed = torch.einsum("oc,bchw->bohw", w[f"{name}.deform_mix.weight"][:, :, 0, 0], sampled)
        deformed = self.gelu(deformed + w[f"{name}.deform_mix.bias"].view(-1, 1, 1))
        return x + self.batch_norm(f"{name}.norm", deformed)

    def softmax_attention(self, name, query, keys):
        """(N, C) queries, (M, C) keys of one image, two heads."""
        weight, bias = self.weights[f"{name}.in_proj_weight"], self.weights[f"{name}.in_proj_bias"]
        dim = query.shape[1]
        q, k, v = (
            x @ weight[i * dim : (i + 1) * dim].T + bias[i * dim : (i + 1) * dim]
            for i, x in enumerate((query, keys, keys))
        )
        heads = []
        for own in (slice(0, dim // 2), slice(dim // 2, dim)):
            scores = torch.exp(q[:, own] @ k[:, own].T / math.sqrt(dim // 2))
            heads.append(scores / scores.sum(1, keepdim=True) @ v[:, own])
        return self.linear(f"{name}.out_proj", torch.cat(heads, 1))

    def interaction(self, tokens):
        """(T, N, C) of one image."""
        name, dim = "decoder.interaction.attention", tokens.shape[2]
        if self.attention == "pixel":
            pixels = [self.softmax_attention(name, pixel, pixel) for pixel in tokens.unbind(1)]
            attended = torch.stack(pixels, 1)
        elif self.attention == "global":
            every = tokens.flatten(0, 1)
            attended = self.softmax_attention(name, every, every).view_as(tokens)
        else:
            value = self.weights[f"{name}.in_proj_weight"][2 * dim :]
            value = tokens @ value.T + self.weights[f"{name}.in_proj_bias"][2 * dim :]
            attended = self.linear(f"{name}.out_proj", value)
        return self.layer_norm(
            "decoder.interaction.norm", self.linear("decoder.interaction.linear", attended)
        )

    def query(self, task, own, fused):
        """(N, C) of the task, (T, N, C) of all."""
        name = f"decoder.queries.{task}"
        if self.attention in ("released", "pixel"):
            pixels = [
                self.softmax_attention(f"{name}.attention", own[n : n + 1], fused[:, n])
                for n in range(len(own))
            ]
            attended = torch.cat(pixels)
        elif self.attention == "global":
            attended = self.softmax_attention(f"{name}.attention", own, fused.flatten(0, 1))
        else:
            every, half = fused.flatten(0, 1), own.shape[1] // 2
            q, k, v = (
                self.layer_norm(f"{name}.attention.norm_{letter}", x)
                @ self.weights[f"{name}.attention.to_{letter}.weight"].T
                for letter, x in (("q", own), ("k", every), ("v", every))
            )
            heads = [q[:, s] @ k[:, s].T @ v[:, s] for s in (slice(0, half), slice(half, None))]
            attended = self.linear(f"{name}.attention.proj", torch.cat(heads, 1) * half**-0.5)
        return own + self.layer_norm(f"{name}.norm", self.linear(f"{name}.linear", attended))

    def gate(self, tokens):
        name, dim = "decoder.gate", tokens.shape[-1]
        hidden = self.gelu(self.linear(f"{name}.fc1", self.layer_norm(f"{name}.norm", tokens)))
        u, v = hidden[..., :dim], hidden[..., dim:]
        gate = self.linear(f"{name}.gate", self.layer_norm(f"{name}.gate.norm", v))
        return tokens + self.linear(f"{name}.fc2", u * gate)

    def __call__(self, features, size):
        x = self.embed(features)
        depth = 1 + max(int(name.split(".")[2]) for name in self.weights if name.startswith("mixers."))
        maps = dict.fromkeys(self.tasks, x)
        for task in self.tasks:
            for layer in range(depth):
                maps[task] = self.mixer_layer(f"mixers.{task}.{layer}", maps[task])
        outputs = {task: [] for task in self.tasks}
        for image in range(x.shape[0]):
            tokens = torch.stack([maps[task][image].flatten(1).T for task in self.tasks])
            fused = self.interaction(tokens)
            for index, task in enumerate(self.tasks):
                decoded = self.gate(self.query(task, tokens[index], fused))
                decoded = decoded.T.unflatten(1, x.shape[2:])[None]
                w = self.weights
                y = functional.conv2d(decoded, w[f"predictions.{task}.conv.weight"], padding=1)
                y = self.batch_norm(f"predictions.{task}.norm", y).clamp(min=0)
                logits = w[f"predictions.{task}.logits.weight"], w[f"predictions.{task}.logits.bias"]
                y = functional.conv2d(y, *logits)
                outputs[task].append(
                    functional.interpolate(y, size=size, mode="bilinear", align_corners=False)
                )
        return {task: torch.cat(each) for task, each in outputs.items()}


@every_attention
def test_equations(attention):
    head, features = small_head(attention).eval(), small_features()
    with torch.no_grad():
        got, want = head(features, (20, 33)), Formula(head, attention)(features, (20, 33))
    assert list(got) == list(want)
    for task in want:
        assert_close(got[task], want[task], 10_000, name=task)


@every_attention
def test_each_image_is_on_its_own(attention):
    head, features = small_head(attention, tasks=3).eval(), small_features(batch=3)
    with torch.no_grad():
        together = head(features, (28, 36))
        for image in range(3):
            alone = head([feature[image : image + 1] for feature in features], (28, 36))
            for task, prediction in together.items():
                assert_close(prediction[image : image + 1], alone[task], 10_000, name=task)


@every_attention
@pytest.mark.parametrize("tasks", range(1, 9))
def test_one_to_eight_tasks(attention, tasks):
    head = small_head(attention, tasks).float()
    predictions = head([feature.float() for feature in small_features(1, 5, 3)], (11, 7))
    assert {task: tuple(p.shape) for task, p in predictions.items()} == {
        f"task{index}": (1, index + 1, 11, 7) for index in range(tasks)
    }
    assert all(prediction.isfinite().all() for prediction in predictions.values())


@every_attention
def test_gradients_reach_all_that_has_an_effect(attention):
    head, features = small_head(attention, depth=2), small_features()
    for feature in features:
        feature.requires_grad_()
    probes = {task: draw(2, index + 1, 14, 18, seed=index) for index, task in enumerate(head.predictions)}
    predictions = head(features, (14, 18))
    sum((predictions[task] * probe).sum() for task, probe in probes.items()).backward()
    assert all(feature.grad.norm() > 0 for feature in features)
    for name, parameter in head.named_parameters():
        gradient = parameter.grad
        if name == "decoder.interaction.attention.in_proj_weight" and attention in ("released", "linear"):
            # Softmax over one key: query and key have no effect.
            assert gradient[: 2 * 8].norm() == 0
            gradient = gradient[2 * 8 :]
        assert gradient.norm() > 1e-9, name


def test_directional_derivative():
    head, features = small_head("pixel").eval(), small_features(1)
    features[0].requires_grad_()
    direction = draw(*features[0].shape, seed=5)

    def total(step):
        moved = [features[0] + step * direction, *features[1:]]
        return sum((p * draw(*p.shape, seed=7)).sum() for p in head(moved, (14, 18)).values())

    (gradient,) = torch.autograd.grad(total(0.0), features[0])
    with torch.no_grad():
        difference = (total(1e-6) - total(-1e-6)) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)


@every_attention
def test_a_single_image_in_training_has_the_gradient_of_a_plain_batch_norm(attention):
    # Some layouts of the gradient that the head returns would be wrong in a CPU BatchNorm before it.
    head, (first, *others) = small_head(attention), small_features(1)
    first.requires_grad_()
    before = functional.batch_norm(first, None, None, training=True)
    predictions = head([before, *others], (7, 9))
    (gradient,) = torch.autograd.grad(sum(p.square().sum() for p in predictions.values()), first)
    mean, var = first.mean((2, 3), keepdim=True), first.var((2, 3), unbiased=False, keepdim=True)
    predictions = head([(first - mean) / torch.sqrt(var + 1e-5), *others], (7, 9))
    (expected,) = torch.autograd.grad(sum(p.square().sum() for p in predictions.values()), first)
    assert relative_l2(gradient, expected) < 1e-9


@pytest.mark.parametrize("attention", ["released", "pixel", "global"])
def test_parameter_count_with_swin_tiny_planes(attention):
    with torch.device("meta"):
        head = DeGMixHead((96, 192, 384, 768), NYUD, attention=attention)
    assert sum(parameter.numel() for parameter in head.parameters()) == 33_195_899 - 27_517_818


def test_released_weights_load_into_pixel_and_global():
    released = small_head("released")
    for attention in ("pixel", "global"):
        small_head(attention).load_state_dict(released.state_dict())


def test_initial_weights():
    torch.manual_seed(0)
    head = DeGMixHead((64,), NYUD, depth=1, dim=64)
    for mixer in head.mixers.values():
        assert not mixer[0].offsets.p_conv.weight.any()
        assert mixer[0].offsets.opt.weight.any()
    assert not head.decoder.gate.gate.weight.any()
    assert (head.decoder.gate.gate.bias == 1).all()
    for prediction in head.predictions.values():
        assert not prediction.logits.bias.any()
    assert head.predictions["semseg"].logits.weight.std().item() == pytest.approx(0.01, rel=0.2)


def test_half_precision_keeps_offsets_exact(device):
    head = small_head("pixel").float().to(device).eval()
    offsets = head.mixers["task0"][0].offsets
    x = draw(1, 8, 40, 50).float().to(device)
    exact = offsets(x)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(offsets(x), exact)
        assert offsets(x.bfloat16()).dtype == torch.float32
    features = [feature.float().to(device) for feature in small_features()]
    with torch.autocast(device.type, torch.bfloat16):
        predictions = head(features, (14, 18))
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in predictions.values())


@every_attention
def test_autocast_takes_maps_of_several_dtypes(device, attention):
    """A GPU's autocast leaves Swin's first map, behind a LayerNorm, in fp32 and the others in bf16."""
    head = small_head(attention).float().to(device).eval()
    features = [feature.float().to(device) for feature in small_features()]
    embedded = []  # one dtype, so that concatenated maps are not widened to fp32
    head.embed.register_forward_pre_hook(lambda _, maps: embedded.extend(each.dtype for each in maps[0]))
    with torch.autocast(device.type, torch.bfloat16):
        expected = head([feature.bfloat16() for feature in features], (14, 18))
        mixed = head([features[0], *(feature.bfloat16() for feature in features[1:])], (14, 18))
        with pytest.raises(TypeError, match=r"features\[1\]: expected torch.float32, got torch.float64"):
            head([features[0], *(feature.double() for feature in features[1:])], (14, 18))
    with pytest.raises(TypeError, match=r"features\[1\]: expected torch.float32, got torch.bfloat16"):
        head([features[0], *(feature.bfloat16() for feature in features[1:])], (14, 18))
    assert set(embedded) == {torch.bfloat16}
    for task, prediction in mixed.items():
        assert torch.equal(prediction, expected[task])


@pytest.mark.filterwarnings("error:.*no Triton kernel yet")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_attention
def test_triton_head_agrees_with_the_reference(attention, training, device):
    """Every op forced to its kernels: predictions, statistics, gradients of all features and parameters."""
    # The tokens of "linear" are at a sixteenth: a batch statistic over four of them would amplify rounding.
    size = (2, 11, 13) if attention == "linear" else (1, 5, 6)
    results = []
    for backend in ("reference", "triton"):
        head = small_head(attention, dim=16).float().to(device).train(training)
        features = [feature.float().to(device).requires_grad_() for feature in small_features(*size)]
        with use_backend(backend):
            predictions = head(features, (10, 12))
            sum(p.square().sum() for p in predictions.values()).backward()
        named = {**dict(head.named_parameters()), **dict(enumerate(features))}
        gradients = {name: leaf.grad for name, leaf in named.items() if leaf.grad is not None}
        results.append({**predictions, **gradients, **dict(head.named_buffers())})
    reference, triton = results
    assert reference.keys() == triton.keys()
    for name, value in reference.items():
        close = relative_l2(triton[name], value) < 1e-4 or (triton[name] - value).norm() < 1e-4
        assert close, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "softmax"}, "attention: expected one of 'released', .*'global', got 'softmax'"),
        ({"tasks": {}}, "tasks: expected 1 to 8 tasks, got 0"),
        ({"tasks": {f"t{i}": 1 for i in range(9)}}, "tasks: expected 1 to 8 tasks, got 9"),
        ({"tasks": {"a.b": 1}}, "tasks: expected names that can name a module, got 'a.b'"),
        ({"tasks": {"keys": 1}}, "tasks: expected names that can name a module, got 'keys'"),
        ({"tasks": {"depth": 0}}, r"tasks\['depth'\]: expected at least 1 channel, got 0"),
        ({"heads": 3}, "heads: expected a divisor of dim = 8, got 3"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"in_channels": ()}, "in_channels: expected positive channel counts"),
        ({"in_channels": (3, 0)}, "in_channels: expected positive channel counts"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"in_channels": (3, 4), "tasks": {"depth": 1}, "dim": 8} | change
    with pytest.raises(ValueError, match=message):
        DeGMixHead(arguments.pop("in_channels"), arguments.pop("tasks"), **arguments)


def test_bad_features():
    head = DeGMixHead((3, 4), {"depth": 1}, dim=8)
    good = [torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 2, 2)]
    with pytest.raises(ValueError, match="features: expected 2 maps, got 1"):
        head(good[:1], (8, 8))
    with pytest.raises(
        ValueError, match=r"features\[1\]: expected shape \(B, 4, H, W\) .*got \(1, 3, 4, 4\)"
    ):
        head([good[0], good[0]], (8, 8))
    with pytest.raises(
        ValueError, match=r"size: expected \(height, width\), integers of at least 1, got \(8, 0\)"
    ):
        head(good, (8, 0))


def test_offsets_in_fp32_are_the_fp64_ones_but_for_their_rounding():
    """Large coordinates must not cost the small learned positions their digits."""
    torch.manual_seed(0)
    offsets = Offsets(32)
    torch.nn.init.normal_(offsets.p_conv.weight, std=0.05)
    x = torch.randn(1, 32, 53, 70)
    rounded = offsets(x).double()
    expected = offsets.double()(x.double())
    # The most that rounding the exact result to fp32 can cost.
    assert relative_l2(rounded, expected) <= torch.finfo(torch.float32).eps / 2
