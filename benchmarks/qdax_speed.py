"""DCRL-MAP-Elites of QDax (JAX) on the point mass, for comparison with dcg_speed.py.

Run it with a Python that has qdax installed (it pins its own dependencies):

    OTHER_PYTHON benchmarks/qdax_speed.py

Prints JSON: evaluations a second, critic updates a second (with the actor's), offspring by gradients
a second; each the median of some repetitions after compiling.
"""

import json
import statistics
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from qdax.core.emitters.dcrl_emitter import DCRLConfig, DCRLEmitter
from qdax.core.neuroevolution.buffers.buffer import DCRLTransition
from qdax.core.neuroevolution.networks.networks import MLP, MLPDC

PEOPLE, HORIZON, STRIDE = 256, 25, 0.045
OFFSPRING, GRADIENT_STEPS, UPDATES, BATCH = 128, 10, 300, 100
POLICY, HIDDEN = (128, 128), (256, 256)


def main() -> None:
    keys = iter(jax.random.split(jax.random.key(0), 1_000))
    policy = MLP(layer_sizes=(*POLICY, 2), final_activation=jnp.tanh)
    actor = MLPDC(layer_sizes=(*HIDDEN, 2), final_activation=jnp.tanh)

    def score(genotypes):
        def play(params):
            def step(state, _):
                place, clock = state
                obs = jnp.append(place, clock / HORIZON)
                action = policy.apply(params, obs)
                following = jnp.clip(place + STRIDE * action, -1, 1)
                reward = 1 - 0.5 * jnp.square(action).sum()
                next_obs = jnp.append(following, (clock + 1) / HORIZON)
                over = jnp.float32(clock + 1 == HORIZON)
                return (following, clock + 1), (obs, action, reward, next_obs, over)

            (place, _), rows = jax.lax.scan(step, (jnp.zeros(2), 0.0), length=HORIZON)
            return rows[2].sum(), place, rows

        return jax.vmap(play)(genotypes)

    genotypes = jax.vmap(policy.init)(jax.random.split(next(keys), PEOPLE), jnp.zeros((PEOPLE, 3)))
    scored = jax.jit(score)
    fitness, places, (obs, action, reward, next_obs, over) = scored(genotypes)
    nothing = jnp.zeros_like(obs[..., :2])
    transitions = DCRLTransition(
        obs=obs, next_obs=next_obs, rewards=reward, dones=over, truncations=jnp.zeros_like(over),
        actions=action, state_desc=nothing, next_state_desc=nothing, desc=nothing, desc_prime=nothing,
    )  # fmt: skip
    task = SimpleNamespace(
        descriptor_length=2,
        action_size=2,
        observation_size=3,
        descriptor_limits=(jnp.full(2, -1.0), jnp.full(2, 1.0)),
    )
    emitter = DCRLEmitter(
        DCRLConfig(
            dcrl_batch_size=OFFSPRING,
            ai_batch_size=0,
            critic_hidden_layer_size=HIDDEN,
            num_critic_training_steps=UPDATES,
            num_pg_training_steps=GRADIENT_STEPS,
            batch_size=BATCH,
            replay_buffer_size=100_000,
        ),
        policy,
        actor,
        task,
    )
    state = emitter.init(next(keys), None, genotypes, fitness, places, {"transitions": transitions})

    @jax.jit
    def learn(state):
        return jax.lax.scan(
            emitter._scan_actor_critic_training, state, length=emitter._actor_critic_iterations
        )[0]

    parents = jax.tree.map(lambda x: x[:OFFSPRING], genotypes)
    climb = jax.jit(lambda state: emitter.emit_pg(state, parents, places[:OFFSPRING]))

    def rate(work, amount: int, repetitions: int = 5) -> float:
        jax.block_until_ready(work())
        times = []
        for _ in range(repetitions):
            began = time.perf_counter()
            jax.block_until_ready(work())
            times.append(time.perf_counter() - began)
        return amount / statistics.median(times)

    print(
        json.dumps(
            {
                "evaluations": rate(lambda: scored(genotypes), PEOPLE, 20),
                "critic_updates": rate(lambda: learn(state), UPDATES),
                "gradient_steps": rate(lambda: climb(state), OFFSPRING * GRADIENT_STEPS),
            }
        )
    )


if __name__ == "__main__":
    main()
