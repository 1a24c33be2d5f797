"""The GPU memory of a training step at Orpheus-3B's size, counted tensor by tensor without a GPU.

python tests/benchmarks/account_memory.py  # against --plan: 40 settings, 10 minutes
python tests/benchmarks/account_memory.py --backend unsloth --rows 2048 --accumulation 1

The step runs on torch's fake tensors, which have shapes and no contents; every storage that an
operation returns counts from then until it is freed. The peak is that of forward, loss, backward,
clipping and optimiser step, with a LoRA of rank 64, bf16 autocast, one packed row, adamw_8bit.

Backend transformers is the real Llama of transformers, PEFT's LoRA and the chunks of TRL's loss.
Stand-ins are: the product of Linear4bit, by a matrix dequantised in full, as bitsandbytes does on a
GPU; adamw_8bit, by two states of a byte; the mask of a packed row, which depends on its contents.
Operations are the CPU's, so SDPA's workspace and CUDA's own memory are missing.

Backend unsloth cannot run without a GPU. Its layers are stand-ins that allocate, keep and reuse
what a reading of unsloth 2026.10.9 (kernels/, models/llama.py, utils/attention_dispatch.py for
xformers) and unsloth_zoo (gradient_checkpointing.py) shows. Its loss takes up to half of the memory
that is free, 4 GiB at most; here it takes 256 positions at a time, as TRL's does.
"""

import argparse
import functools
import itertools
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import bitsandbytes  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from trl.trainer.sft_trainer import _chunk  # noqa: E402

from orpheus.memory import GIB, Base, count_weights, memory_plan  # noqa: E402
from orpheus.models import LINEAR_LAYERS  # noqa: E402
from orpheus.settings import Settings  # noqa: E402

RANK, CHUNK = 64, 256  # of the LoRA; positions of the loss at a time


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.storages = {}

    def add(self, tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self.storages:
            return

        def free(_):
            del self.storages[address]
            self.live -= size

        self.storages[address] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result


def quantised(shape) -> nn.Parameter:
    """NF4: half a byte per weight, a byte per 64 weights, a float per 64 × 256."""
    weight = nn.Parameter(torch.empty(shape.numel() // 2, 1, dtype=torch.uint8), False)
    scales = torch.empty(shape.numel() // 64, dtype=torch.uint8)
    weight.quant_state = SimpleNamespace(
        shape=shape, scales=scales, scales_of_scales=torch.empty(shape.numel() // 64 // 256)
    )
    weight.compress_statistics, weight.quant_type = True, "nf4"  # which PEFT reads
    return weight


def in_full(weight, dtype) -> torch.Tensor:
    """The matrix that a quantised weight stands for; any other weight as it is."""
    return torch.empty(weight.quant_state.shape, dtype=dtype) if is_quantised(weight) else weight


def is_quantised(weight) -> bool:
    return hasattr(weight, "quant_state")


# ---------------------------------------------------------------- transformers, PEFT and TRL


class Product4bit(torch.autograd.Function):
    """bitsandbytes.matmul_4bit of many rows; it keeps the packed weight alone."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.weight = weight
        return functional.linear(inputs, in_full(weight, inputs.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ in_full(ctx.weight, gradient.dtype), None


def quantise(model) -> None:
    """Replaces the linear layers of a model on the meta device by bitsandbytes' Linear4bit."""
    for name, layer in list(model.named_modules()):
        parent, _, name = name.rpartition(".")
        if name in LINEAR_LAYERS:
            sizes = layer.in_features, layer.out_features
            new = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16)
            new.weight = quantised(layer.weight.shape)
            new.quant_state = new.weight.quant_state
            setattr(model.get_submodule(parent), name, new)
    model.is_loaded_in_4bit = True


def build_transformers(config, weights: str):
    """PEFT's model on the meta device, as finetune.py's backend transformers loads it."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        if weights == "4bit":
            quantise(model)
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        lora = LoraConfig(r=RANK, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM")
        return get_peft_model(model, lora).train()


def from_meta(model) -> None:
    """Gives a model on the meta device fake weights, tied ones once."""
    copies = {}

    def copy(tensor):
        if is_quantised(tensor):
            return quantised(tensor.quant_state.shape)
        return nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), tensor.requires_grad)

    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                if id(tensor) not in copies:
                    copies[id(tensor)] = copy(tensor)
                module._parameters[name] = copies[id(tensor)]
        for name, tensor in module._buffers.items():
            module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)


def forward_transformers(model, checkpointing, row: int) -> torch.Tensor:
    """The loss of one packed row."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model = model.get_base_model()
    inputs = {"input_ids": torch.zeros(1, row, dtype=torch.long), "use_cache": False}
    inputs["position_ids"] = torch.zeros(1, row, dtype=torch.long)
    inputs["attention_mask"] = torch.ones(1, 1, row, row, dtype=torch.bool)
    hidden = model.model(**inputs).last_hidden_state
    hidden = hidden[..., :-1, :].reshape(row - 1, -1)
    hidden = hidden[torch.arange(row - 1)]  # the labelled positions first: here all of them
    labels, loss, head = torch.zeros(row - 1, dtype=torch.long), 0, model.lm_head.weight
    for part, label in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        chunk = checkpoint(_chunk, part, head, None, label, 1.0, None, use_reentrant=False)
        loss = loss + chunk[0]
    return loss


# ---------------------------------------------------------------- Unsloth, as read


def product(inputs, weight, a, b, scratch=None):
    """kernels/utils.py, matmul_lora: rows @ weight.T + rows @ A.T @ B.T."""
    matrix = weight
    if is_quantised(weight):  # into a buffer that stays, or for this product alone
        shape = weight.quant_state.shape
        matrix = scratch[: shape.numel()].view(shape) if scratch is not None else None
        matrix = in_full(weight, inputs.dtype) if matrix is None else matrix
    result = inputs @ matrix.t()
    del matrix
    return result.addmm_(inputs @ a.to(inputs.dtype).t(), b.to(inputs.dtype).t())


def backward_product(gradient, inputs, weight, a, b, out=None, add=False):
    """The gradients of a product: of its rows (in `out`, written to or added to), A and B."""
    a, b = a.to(inputs.dtype), b.to(inputs.dtype)
    by_b = gradient @ b
    gradients = by_b.t() @ inputs, gradient.t() @ (inputs @ a.t())
    matrix = in_full(weight, inputs.dtype)
    if add:
        out.addmm_(gradient, matrix)
    else:
        out = torch.mm(gradient, matrix, out=out)
    return out.addmm_(by_b, a), *gradients


class Norm(torch.autograd.Function):
    """kernels/rms_layernorm.py: keeps its input; its gradient overwrites the one that it gets."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs, torch.empty(inputs.shape[:-1]))
        return torch.empty_like(inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Linear(torch.autograd.Function):
    """kernels/fast_lora.py, LoRA_W; LoRA_QKV is three of them that reuse more."""

    @staticmethod
    def forward(ctx, inputs, weight, a, b, scratch):
        ctx.save_for_backward(inputs, a, b)
        ctx.weight = weight
        return product(inputs, weight, a, b, scratch)

    @staticmethod
    def backward(ctx, gradient):
        inputs, a, b = ctx.saved_tensors
        rows, *gradients = backward_product(gradient, inputs, ctx.weight, a, b)
        return rows, None, *gradients, None


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        return torch.empty_like(inputs)

    @staticmethod
    def backward(ctx, gradient):
        return torch.empty_like(gradient)


class Attention(torch.autograd.Function):
    """xformers': keeps queries, keys, values, output and the logarithms of its sums."""

    @staticmethod
    def forward(ctx, queries, keys, values):
        output = torch.empty_like(queries)
        ctx.save_for_backward(queries, keys, values, output, torch.empty(queries.shape[:2]))
        return output

    @staticmethod
    def backward(ctx, gradient):
        queries, keys, values, *_ = ctx.saved_tensors
        workspace = torch.empty(queries.shape)  # the queries' gradient is summed up in fp32
        del workspace
        return torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)


class Mlp(torch.autograd.Function):
    """kernels/fast_lora.py, LoRA_MLP: keeps its input, the gate and up; backward reuses all."""

    @staticmethod
    def forward(ctx, inputs, scratch, *layers):
        ctx.layers, ctx.scratch = layers, scratch
        gate, up, down = layers[:3], layers[3:6], layers[6:]
        gates, ups = product(inputs, *gate, scratch), product(inputs, *up, scratch)
        ctx.save_for_backward(inputs, gates, ups)
        return product(torch.empty_like(gates), *down, scratch)

    @staticmethod
    def backward(ctx, gradient):
        inputs, gates, ups = ctx.saved_tensors
        gate, up, (_, a, b) = ctx.layers[:3], ctx.layers[3:6], ctx.layers[6:]
        middle = torch.empty_like(gates)  # by way of the scratch; then gates and ups, in place
        by_b = gradient @ b.to(gradient.dtype)
        down_gradients = by_b.t() @ middle, gradient.t() @ (middle @ a.to(gradient.dtype).t())
        rows, *up_gradients = backward_product(ups, inputs, *up, out=inputs)
        rows, *gate_gradients = backward_product(gates, inputs, *gate, out=rows, add=True)
        layers = gate_gradients, up_gradients, down_gradients
        return rows, None, *itertools.chain(*((None, *gradients) for gradients in layers))


class Checkpoint(torch.autograd.Function):
    """Keeps a layer's input, or has it copied from the CPU into a buffer of the GPU."""

    @staticmethod
    def forward(ctx, inputs, layer, buffer):
        ctx.layer, ctx.buffer = layer, buffer
        if buffer is None:
            ctx.save_for_backward(inputs)
        with torch.no_grad():
            return layer(inputs)

    @staticmethod
    def backward(ctx, gradient):
        inputs = (ctx.saved_tensors[0] if ctx.buffer is None else ctx.buffer).detach()
        inputs.requires_grad_()
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            output = ctx.layer(inputs)
        torch.autograd.backward(output, gradient)
        return inputs.grad, None, None


class Loss(torch.autograd.Function):
    """fused_losses/cross_entropy_loss.py: the gradient of its input is made in its forward pass."""

    @staticmethod
    def forward(ctx, hidden, head):
        gradients = torch.empty_like(hidden)
        for part, gradient in zip(hidden.split(CHUNK), gradients.split(CHUNK), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                logits = functional.linear(part, head).float()
                loss = functional.cross_entropy(logits, torch.zeros(len(part), dtype=torch.long))
            gradient.copy_(torch.autograd.grad(loss, part)[0])
            del logits, loss
        ctx.save_for_backward(gradients)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0], None


class UnslothModel(nn.Module):
    """What Unsloth's Llama holds on the GPU, and what its layers do."""

    def __init__(self, config, weights: str, shapes: dict):
        super().__init__()
        empty = functools.partial(torch.empty, dtype=torch.bfloat16)

        def frozen(*shape):
            return nn.Parameter(empty(*shape), requires_grad=False)

        def adapted(shape):
            weight = quantised(shape) if weights == "4bit" else frozen(*shape)
            return nn.ParameterList(
                [weight, torch.empty(RANK, shape[1]), torch.empty(shape[0], RANK)]
            )

        self.embedding = frozen(config.vocab_size, config.hidden_size)
        self.norms = frozen(2 * config.num_hidden_layers + 1, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: adapted(shape) for name, shape in shapes.items()}) for _ in layers
        )
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.rope = empty(2, config.max_position_embeddings, config.head_dim)
        largest = config.hidden_size * config.intermediate_size
        self.scratch = empty(largest) if weights == "4bit" else None

    def run_layer(self, layer, inputs):
        """(tokens, hidden) → (tokens, hidden): models/llama.py, LlamaDecoderLayer_fast_forward."""
        normed, shape = Norm.apply(inputs), (len(inputs), -1, self.head_dim)
        projections = ("q_proj", "k_proj", "v_proj")
        queries, keys, values = (
            Linear.apply(normed, *layer[name], self.scratch).view(shape) for name in projections
        )
        queries, keys = Rope.apply(queries), Rope.apply(keys)
        keys, values = (t.repeat_interleave(self.groups, 1) for t in (keys, values))
        output = Attention.apply(queries, keys, values).view(len(inputs), -1)
        del queries, keys, values, normed
        inputs = inputs + Linear.apply(output, *layer["o_proj"], self.scratch)
        weights = (w for name in ("gate_proj", "up_proj", "down_proj") for w in layer[name])
        return inputs + Mlp.apply(Norm.apply(inputs), self.scratch, *weights)


def forward_unsloth(model, checkpointing, row: int) -> torch.Tensor:
    """The loss of one packed row."""
    hidden = functional.embedding(torch.zeros(row, dtype=torch.long), model.embedding)
    hidden.requires_grad_()
    buffers = itertools.cycle([torch.empty_like(hidden), torch.empty_like(hidden)])
    for number, layer in enumerate(model.layers, 1):
        run = functools.partial(model.run_layer, layer)
        if checkpointing:
            offload = checkpointing == "unsloth" and number < len(model.layers)
            hidden = Checkpoint.apply(hidden, run, next(buffers) if offload else None)
        else:
            hidden = run(hidden)
    return Loss.apply(Norm.apply(hidden), model.embedding)


# ---------------------------------------------------------------- the step, and the table


def account(shapes, backend, weights: str, checkpointing, row: int, accumulation: int):
    """(peak of a training step, the base's weights), in bytes."""
    config = LlamaConfig.from_pretrained(ROOT / "tests/orpheus-3b")
    unsloth = backend == "unsloth"
    model = None if unsloth else build_transformers(config, weights)
    with FakeTensorMode(), LiveStorages() as storages:
        if unsloth:
            model = UnslothModel(config, weights, shapes)
        else:
            from_meta(model)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        base = storages.live - sum(4 * weight.numel() for weight in trained)
        moments = [torch.empty(2, weight.numel(), dtype=torch.uint8) for weight in trained]
        for weight in trained if accumulation > 1 else ():  # of the batches before
            weight.grad = torch.empty_like(weight)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (forward_unsloth if unsloth else forward_transformers)(model, checkpointing, row)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for weight, moment in zip(trained, moments, strict=True):
            moment.add_(1)
            weight.detach().add_(weight.grad)
    return storages.peak, base


def plan(base: Base, backend, weights: str, checkpointing, row: int, accumulation: int) -> float:
    """Bytes that --plan gives for the same step, without samples, the codec and CUDA's own."""
    settings = dict(Settings())
    settings |= {"backend": backend, "weights": weights, "gradient_checkpointing": checkpointing}
    settings |= {"max_length": row, "gradient_accumulation_steps": accumulation, "bf16": True}
    parts = memory_plan(settings | {"sample_texts": []}, base)
    return sum(parts.values()) - parts["codec, CUDA"]


def print_table(words) -> None:
    config = LlamaConfig.from_pretrained(ROOT / "tests/orpheus-3b")
    base, worst = count_weights(config), {"the whole": 0, "what is above the weights": 0}
    with torch.device("meta"):
        layer = LlamaForCausalLM(config).model.layers[0]
    names = {name: name.rpartition(".")[2] for name, _ in layer.named_modules()}
    shapes = {
        names[name]: module.weight.shape
        for name, module in layer.named_modules()
        if names[name] in LINEAR_LAYERS
    }
    print("planned / counted GiB\n")
    print(f"| backend | weights | checkpointing | {' | '.join(f'{row:,}' for row in words.rows)} |")
    print(f"|---|---|---|{'---|' * len(words.rows)}")
    for way in itertools.product(words.backend, words.weights, (False, True, "unsloth")):
        if way[2] == "unsloth" and way[0] != "unsloth":
            continue
        print(f"| {way[0]} | {way[1]} | {json.dumps(way[2])} |", end="")
        for row in words.rows:
            peak, weights = account(shapes, *way, row, words.accumulation)
            planned = plan(base, *way, row, words.accumulation)
            for name, part in zip(worst, (peak, peak - weights), strict=True):
                worst[name] = max(worst[name], abs(planned - peak) / part)
            print(f" {planned / GIB:.2f} / {peak / GIB:.2f} |", end="", flush=True)
        print()
    for name, share in worst.items():
        print(f"furthest apart: {share:.1%} of {name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", nargs="+", default=["transformers", "unsloth"])
    parser.add_argument("--weights", nargs="+", default=["4bit", "16bit"])
    parser.add_argument("--rows", nargs="+", type=int, default=[2048, 4096, 8192, 16384])
    parser.add_argument("--accumulation", type=int, default=4, help="batches per optimiser step")
    torch.set_autocast_enabled("cuda", True)  # which PEFT looks at
    bitsandbytes.matmul_4bit = lambda rows, weight, **_: Product4bit.apply(rows, weight)
    print_table(parser.parse_args())


if __name__ == "__main__":
    main()
