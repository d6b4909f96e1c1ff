"""The networks against arrays that the original made: in float32 on the CPU, every array of every file."""

from __future__ import annotations

import pytest
import tiny
import torch
from reference_sampler import integrate, sample_reference
from tiny import Golden, relative_error

from bitdance.models import flow
from bitdance.models.layers import rotary_table
from bitdance.models.quantizer import entropy_loss, quantize
from bitdance.models.tokens import tokens_from_grid

ACTIVATIONS = 1e-5
GRADIENTS = 1e-4
NUM_STEPS = 10


def check_autoencoder(golden, model, parallel_num):
    autoencoder = tiny.autoencoder()
    with torch.no_grad():
        pre_sign = autoencoder.encoder(golden["ae_image"])
        bits = autoencoder.encode(golden["ae_image"])
        recon = autoencoder.decode(bits)
    assert relative_error(pre_sign, golden["ae_pre_sign"]) <= ACTIVATIONS
    assert torch.equal(bits, golden["ae_bits"].float())
    assert torch.equal(tiny.group_indices(bits), golden["ae_indices"])
    assert relative_error(recon, golden["ae_recon"]) <= ACTIVATIONS


def check_entropy_loss(golden, model, parallel_num):
    x = golden["ae_pre_sign"].clone().requires_grad_()
    loss = entropy_loss(x)
    loss.total.backward()
    assert relative_error(loss.total, golden["lfq_entropy_aux"]) <= ACTIVATIONS
    assert relative_error(loss.per_sample, golden["lfq_per_sample_entropy"]) <= ACTIVATIONS
    assert relative_error(loss.codebook, golden["lfq_codebook_entropy"]) <= ACTIVATIONS
    assert relative_error(x.grad, golden["lfq_entropy_grad"]) <= GRADIENTS


def check_trunk(golden, model, parallel_num):
    tokens = tokens_from_grid(golden["latents"].float(), model.config.patch)
    with torch.no_grad():
        hidden = model.forward_features(tokens[:, :-parallel_num], golden["class_id"])
        cond = model(tokens, golden["class_id"])
    assert relative_error(hidden, golden["hidden"]) <= ACTIVATIONS
    copies = 2
    rows = golden["head_cond"].reshape(copies, *cond.shape)
    assert relative_error(cond.expand_as(rows), rows) <= ACTIVATIONS
    assert torch.equal(tokens.expand(copies, -1, -1, -1), golden["head_target"].reshape(copies, *tokens.shape).float())


def check_standard_order(golden, model, parallel_num):
    model = tiny.model(4, token_order="standard")
    tokens = tokens_from_grid(golden["latents"].float(), model.config.patch)
    with torch.no_grad():
        hidden = model.forward_features(tokens[:, :-4], golden["class_id"])
    assert relative_error(hidden, golden["standard_hidden"]) <= ACTIVATIONS
    assert torch.equal(tokens.repeat(2, 1, 1).reshape(-1, 4, 32), golden["standard_head_target"].float())


def check_rotary_table_and_mask(golden, model, parallel_num):
    expected = golden["rope_cos_sin"]
    assert relative_error(model.rotary, expected) <= 1e-7
    assert rotary_table(torch.zeros(1, 2), 64).shape == (1, 32, 2)
    if parallel_num > 1:
        assert torch.equal(model._mask(len(model.blocks)), golden["attn_allowed"])
    else:
        assert model._mask(len(model.blocks)) == "causal" and torch.equal(model.blocks, torch.arange(71))


def check_head_network(golden, model, parallel_num):
    x, t, cond = golden["net_x"], golden["net_t"], golden["net_cond"]
    with torch.no_grad():
        out = model.head.net(x.reshape(5, parallel_num, 32), t, cond.reshape(5, parallel_num, 128))
    assert relative_error(out.reshape(x.shape), golden["net_out"]) <= ACTIVATIONS


def check_loss_and_gradients(golden, model, parallel_num):
    model.zero_grad()
    tokens = tokens_from_grid(golden["latents"].float(), model.config.patch)
    t = flow.logit_normal_timesteps(golden["loss_t_normal"], mean=-0.8, std=0.8)
    x_0 = golden["loss_noise"].reshape(-1, parallel_num, 32)
    loss = model.loss(tokens, golden["class_id"], t, x_0)
    loss.backward()
    assert relative_error(loss, golden["loss"]) <= ACTIVATIONS
    names, expected = golden.strings("grad_names"), golden["grad_norms"]
    norms = {name: parameter.grad.double().norm() for name, parameter in model.named_parameters()}
    assert set(names) == set(norms)
    for name, norm in zip(names, expected, strict=True):
        assert relative_error(norms[name], norm) <= GRADIENTS, name


def check_solver(golden, model, parallel_num, case):
    shift = 3.0 if "shift" in case else 1.0
    scale = 3.0 if "cfg3" in case else None
    head = tiny.model(parallel_num, time_shift=shift)
    cond, noise, out = (golden[case.format(part)] for part in ("cond", "noise", "out"))
    cond, noise = cond.reshape(len(cond), parallel_num, -1), noise.reshape(*noise.shape[:2], parallel_num, 32)
    with torch.no_grad():
        x = integrate(head, cond, noise, scale)
    both = x if scale is None else torch.cat([x, x])
    assert relative_error(both.reshape(out.shape), out) <= ACTIVATIONS

    net, solver = head.head.net, flow.make_solver("euler-maruyama", len(noise) - 1, shift)

    def predict(x, j):
        t = solver.timesteps[j]
        if scale is None:
            return net(x, t.expand(len(x)), cond)
        return flow.apply_cfg(*net(torch.cat([x, x]), t.expand(len(cond)), cond).chunk(2), scale)

    with torch.no_grad():
        assert relative_error(flow.integrate(solver, predict, noise), x) <= 1e-5, "not the reference loop"


SAMPLING_NAMES = {
    ("linear", 1.0): "gen_{}_cfg1",
    ("linear", 3.2): "gen_{}_cfg3.2",
    ("constant", 1.5): "genconst_{}_cfg1.5",
}


def check_sampling_step_by_step(golden, model, parallel_num, schedule, scale):
    """Teacher forcing with the golden bits: a value near zero may take either sign, and all after it would differ."""
    name = SAMPLING_NAMES[schedule, scale]
    bits, pre_sign = golden[name.format("bits")].float(), golden[name.format("pre_sign")]
    tokens = tokens_from_grid(bits, model.config.patch)
    labels, p = torch.tensor([2, 5, 9]), parallel_num
    guided, own_first = scale > 1, scale > 1 and schedule == "linear"
    null_first = golden["gen_null_first_pre_sign_cfg3.2"] if own_first else None
    if guided:
        tokens = tokens.repeat(2, 1, 1)
        labels = torch.cat([labels, torch.full_like(labels, 10)])
        if null_first is not None:
            tokens[3:, :p] = quantize(null_first)
    with torch.no_grad():
        cond = model(tokens, labels)
        for i in range(model.config.ar_steps):
            group = slice(i * p, (i + 1) * p)
            g = flow.guidance_scale(scale, i, model.config.ar_steps, schedule)
            alone = not guided or g == 1
            noise = torch.zeros(NUM_STEPS + 1, len(labels) if alone else 3, p, 32)
            x = integrate(model, cond[:, group], noise, None if alone else g)
            expected = pre_sign[i] if not (alone and guided) else torch.cat([pre_sign[i], null_first])
            assert relative_error(x, expected) <= 5e-3, f"step {i}"
            sure = expected.abs() > 0.05
            assert torch.equal(quantize(x)[sure], quantize(expected)[sure]), f"step {i}"
            assert torch.equal(quantize(expected[:3]), tokens[:3, group]), f"step {i}: the golden bits are the signs"


def check_sampling_free_running(golden, model, parallel_num, schedule, scale):
    """Bits are equal up to the first value so near zero that rounding decides its sign, if there is one."""
    name = SAMPLING_NAMES[schedule, scale]
    pre_sign, p = golden[name.format("pre_sign")], parallel_num
    expected = tokens_from_grid(golden[name.format("bits")].float(), model.config.patch)

    def no_noise(step, null):
        return torch.zeros(NUM_STEPS + 1, 3, p, 32)

    tokens = sample_reference(model, torch.tensor([2, 5, 9]), no_noise, scale, schedule)
    for i in range(model.config.ar_steps):
        different = tokens[:, i * p : (i + 1) * p] != expected[:, i * p : (i + 1) * p]
        if different.any():
            assert pre_sign[i][different].abs().max() < 5e-3, f"step {i}"
            assert parallel_num == 16, "only 16x is known to come so near to zero"
            break


def check_decoded_images(golden, model, parallel_num, scale):
    with torch.no_grad():
        images = tiny.autoencoder(parallel_num).decode(golden[f"gen_bits_cfg{scale}"].float())
    # The golden images are stored in half precision, so nothing closer than its rounding can be asked.
    assert relative_error(images.half(), golden[f"gen_image_cfg{scale}"]) <= 5e-5


SAMPLING = [{"schedule": schedule, "scale": scale} for schedule, scale in SAMPLING_NAMES]
CHECKS = [
    (check_trunk, {}),
    (check_rotary_table_and_mask, {}),
    (check_head_network, {}),
    (check_loss_and_gradients, {}),
    *((check_solver, {"case": case}) for case in ("em_{}_cfg1", "em_{}_cfg3", "emshift3_{}")),
    *((check, case) for check in (check_sampling_step_by_step, check_sampling_free_running) for case in SAMPLING),
    *((check_decoded_images, {"scale": scale}) for scale in ("1", "3.2")),
]
ONLY = {1: [(check_autoencoder, {}), (check_entropy_loss, {})], 4: [(check_standard_order, {})], 16: []}


@pytest.mark.parametrize("parallel_num", tiny.PARALLEL_NUMS, ids=lambda p: f"{p}x")
def test_every_golden_array(parallel_num, subtests):
    golden, model = Golden(parallel_num), tiny.model(parallel_num)
    for check, arguments in CHECKS + ONLY[parallel_num]:
        with subtests.test(check.__name__, **arguments):
            check(golden, model, parallel_num, **arguments)
    assert golden.unread == set(), "arrays that no check has looked at"
