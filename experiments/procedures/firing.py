"""How many neurons of MLPs fire as they train, and what it is worth if few may.

The first is of a byte-level Transformer, the second of an MLP on MNIST-1D, of
which a share of the training labels is random.
"""

from collections.abc import Callable
import functools

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.models import transformer
from experiments.procedures import mnist1d_mlp
from experiments.procedures import under_masks
from experiments.tasks import text
from sparsejax import activations
from sparsejax import capture

NARROW, WIDE = 128, 512
STEPS, BATCH, LENGTH = 800, 8, 64
VALIDATION = 64  # windows
REPEATED = 32  # windows that random targets are of, learned by heart
TIMES = {"start": 0.0, "quarter": 0.25, "half": 0.5, "end": 1.0}
ARMS = (
  *(f"narrow_{time}" for time in TIMES),
  *(f"wide_{time}" for time in TIMES),
  *(f"random_{time}" for time in TIMES),
)

MLP_WIDTH, KEPT = 256, 16
MLP_STEPS = 2_000
NOISE = 0.4
# Arms of the second: hidden layers, whether top-k, and the share of noise.
MLPS = {
  "top_k": (1, True, NOISE),
  "dense": (1, False, NOISE),
  "top_k_clean": (1, True, 0.0),
  "dense_clean": (1, False, 0.0),
  "top_k_deep": (2, True, NOISE),
  "dense_deep": (2, False, NOISE),
}


@functools.cache
def _text(path: str = "") -> tuple[text.Windows, np.ndarray]:
  training, validation = text.read(path)
  windows = text.Windows(validation, LENGTH)
  chosen = np.linspace(0, len(windows) - 1, VALIDATION).astype(int)
  return text.Windows(training, LENGTH), windows[chosen]


@functools.cache
def _transformer(hidden: int, steps: int) -> tuple[Callable, ...]:
  """(seed) -> state; (state, batches) -> state; (state, batch) -> figures."""

  def model(seed):
    return transformer.Transformer(
      vocabulary=256,
      width=64,
      depth=2,
      heads=4,
      hidden=hidden,
      activation="relu",
      rngs=nnx.Rngs(jax.random.key(seed)),
    )

  graph, _ = nnx.split(nnx.eval_shape(lambda: model(0)))
  rate = optax.warmup_cosine_decay_schedule(0, 5e-3, steps // 10, steps)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

  def loss(params, windows, targets):
    logits = nnx.merge(graph, params)(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, targets.astype(jnp.int32)
    ).mean()

  @jax.jit
  def init(seed):
    params = nnx.to_pure_dict(nnx.state(model(seed)))
    return params, optimizer.init(params)

  @jax.jit
  def train(state, batches):
    def step(state, batch):
      params, opt_state = state
      grads = jax.grad(loss)(params, *batch)
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), None

    return lax.scan(step, state, batches)[0]

  @jax.jit
  def figures(state, windows, targets):
    model = nnx.merge(graph, state[0])
    run = lambda model: model(windows[:, :-1])
    # What the second layers of the MLPs read are the hidden activations.
    _, read = capture.inputs(run, model, where=lambda name: "down" in name)
    densities = [activations.density(x) for x in read.values()]
    return {
      "density": jnp.stack(densities).mean(),
      "loss": loss(state[0], windows, targets),
    }

  return init, train, figures


def emergence(
  seed: int,
  *,
  narrow: int = NARROW,
  wide: int = WIDE,
  steps: int = STEPS,
  path: str = "",
) -> dict[str, dict[str, float]]:
  """Density and loss of each model at each time.

  On validation text; where targets are random, on what is trained on.

  Args:
    seed: of the initialization, of the text, and of random targets.
    narrow: neurons of an MLP.
    wide: of those of the wider model. The one whose targets are random is as
      wide as the narrow one.
    steps: of the training, a multiple of four.
    path: of the text, as `text.read` takes it.
  """
  training, validation = _text(path)
  generator = np.random.default_rng(seed)
  rows = generator.integers(len(training), size=(steps, BATCH))
  windows = training[rows]
  true = windows[..., 1:]
  few = training[generator.integers(len(training), size=REPEATED)]
  drawn = generator.integers(256, size=few[:, 1:].shape, dtype=np.uint8)
  again = generator.integers(REPEATED, size=rows.shape)
  runs = {
    "narrow": (narrow, (windows, true), (validation, validation[:, 1:])),
    "wide": (wide, (windows, true), (validation, validation[:, 1:])),
    "random": (narrow, (few[again], drawn[again]), (few, drawn)),
  }
  found = {}
  for name, (hidden, data, measured) in runs.items():
    init, train, figures = _transformer(hidden, steps)
    state, done = init(seed), 0
    for time, share in TIMES.items():
      while done < share * steps:  # always as many steps: one program
        end = done + steps // 4
        state = train(state, [x[done:end] for x in data])
        done = end
      values = figures(state, *measured)
      found[f"{name}_{time}"] = {n: float(x) for n, x in values.items()}
  return found


def mislabeled(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
  """Labels of which a share is drawn anew, uniformly; some stay what they were.

  Args:
    labels: int [examples].
    share: of the labels that are drawn, rounded.
    seed: of which, and what they become.
  """
  generator = np.random.default_rng((seed, 2))
  chosen = generator.permutation(len(labels))[: round(share * len(labels))]
  made = np.array(labels)
  drawn = generator.integers(labels.max() + 1, size=len(chosen))
  made[chosen] = drawn
  return made


@functools.cache
def _trainer(*given: int) -> Callable:
  return under_masks.trainer(mnist1d_mlp.setting(*given).loss, mnist1d_mlp.adam)


def noise(
  seed: int,
  *,
  learning_rate: float,
  kept: int = KEPT,
  width: int = MLP_WIDTH,
  steps: int = MLP_STEPS,
  examples: int = 5_000,
) -> dict[str, dict[str, float]]:
  """Figures of MLPs, top-k and dense ones, of noisy and of clean labels.

  Accuracy and loss are of clean validation labels, the training loss is of the
  last tenth of the steps.

  Args:
    seed: of the initialization, of the examples and of the random labels.
    learning_rate: of Adam.
    kept: of a hidden layer's activations, where it is top-k.
    width: of the MLPs.
    steps: of the training.
    examples: of which four fifths are for training.
  """
  found = {}
  for arm, (depth, few, share) in MLPS.items():
    given = width, depth, examples, kept if few else 0
    setting = mnist1d_mlp.setting(*given)
    params = setting.init(seed)
    labels = mislabeled(setting.data["labels"], share, seed)
    trained, losses = _trainer(*given)(
      params,
      under_masks.dense_masks(params),
      setting.data | {"labels": labels},
      setting.order(seed, steps),
      learning_rate=learning_rate,
    )
    found[arm] = setting.measure(trained) | {
      "training_loss": float(losses[-max(1, steps // 10) :].mean())
    }
  return found
