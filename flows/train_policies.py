"""Trains the policies of a run in order of dependency, with their reward models and cached log-probs."""

import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from flows.preparation import Prepared, RecordResult
from tasks.recipe.policies import REFERENCE, is_external
from tasks.recipe.study import PlannedPolicy
from tasks.signals import Stop
from tasks.stages.base import Context, StageResult
from tasks.stages.data import SAMPLE
from tasks.stages.models import CACHE, cache_labels, cache_reference
from tasks.stages.train_reward import REWARD
from tasks.stages.training import Scoring, TrainedPolicy, Training, train_policy
from tasks.store.manifest import Manifest


def train_policies(
    context: Context,
    prepared: Prepared,
    keep: RecordResult,
    parallel: int = 1,
    then: Callable[[TrainedPolicy, RecordResult], Any] = lambda policy, keep: None,
) -> list[TrainedPolicy]:
    """Train every node of the recipe's graph.

    Args:
        parallel: number of nodes trained at the same time; after an error no further node starts.
        then: called after each training, in the same thread.
    """
    nodes = prepared.recipe.nodes()
    labels = cache_labels(nodes)
    learners = {n.seed: None for n in nodes if prepared.recipe.learns_from_model(n.config)}
    one_seed = prepared.recipe.study is None
    rewards = {
        seed: prepared.train_reward(context, seed, "" if one_seed else f" seed {seed}", keep)
        for seed in learners
    }

    def train(node: PlannedPolicy, earlier: Earlier) -> tuple[TrainedPolicy, list[StageResult]]:
        context.stop.check()  # a thread may take its next node before the pool is cancelled
        own: list[StageResult] = []

        def note(result: StageResult) -> Manifest:
            own.append(result)
            return result.manifest

        trainer = _Trainer(context, prepared, note, labels, earlier)
        trained = trainer.train(node, rewards.get(node.seed))
        then(trained, note)
        return trained, own

    trained = []
    for policy, own in _each(nodes, train, 1 if context.plan else parallel, context.stop):
        trained.append(policy)
        for result in own:  # in the recipe's order, whichever thread was faster
            keep(result)
    return trained


Earlier = dict[tuple[str, int], TrainedPolicy]
"""The policies trained so far, by name and seed."""
_Trained = tuple[TrainedPolicy, list[StageResult]]


def _each(
    nodes: list[PlannedPolicy], train: Callable[[PlannedPolicy, Earlier], _Trained], parallel: int, stop: Stop
) -> Iterator[_Trained]:
    """Train the nodes, so many at the same time; yields the results in their order."""
    if parallel > 1:
        yield from _in_threads(nodes, train, parallel, stop)
        return
    done: Earlier = {}
    for node in nodes:
        result = train(node, done)
        done[node.policy, node.seed] = result[0]
        yield result


def _in_threads(
    nodes: list[PlannedPolicy], train: Callable[[PlannedPolicy, Earlier], _Trained], parallel: int, stop: Stop
) -> list[_Trained]:
    """Train the nodes in threads; a node waits for those that it needs, which were submitted before it."""
    futures: dict[tuple[str, int], Future[_Trained]] = {}
    failed = threading.Event()

    def begin(node: PlannedPolicy) -> _Trained:
        if failed.is_set():
            raise CancelledError
        try:
            return train(node, {key: futures[key].result()[0] for key in node.needs})
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(parallel) as pool:
        running = []
        for node in nodes:
            # Prefect finds a task's flow through context variables, which a thread does not inherit.
            future = pool.submit(contextvars.copy_context().run, begin, node)
            futures[node.policy, node.seed] = future
            running.append(future)
        try:
            for future in wait(running, return_when=FIRST_EXCEPTION).done:
                if not isinstance(future.exception(), CancelledError):
                    future.result()
            return [future.result() for future in running]
        except BaseException as error:
            stop.begin(error)  # if it is a stop, other threads end their work; otherwise they finish it
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@dataclass(frozen=True)
class _Trainer:
    """Trains one node from the prepared artifacts and the policies trained so far."""

    context: Context
    prepared: Prepared
    keep: RecordResult
    labels: dict[str, str]
    """See `cache_labels`."""
    earlier: Earlier

    def train(self, node: PlannedPolicy, reward_model: Manifest | None) -> TrainedPolicy:
        prepared, recipe, policy = self.prepared, self.prepared.recipe, node.config
        needed = self._needed(node)
        logps = None
        if policy.entry.reference(policy.settings) == "cached":
            logps = self._logps(node)
            needed[CACHE.name + self.labels[node.label]] = logps
        scoring = None
        if policy.entry.scored:
            learned = recipe.learns_from_model(policy)
            reward_model = reward_model if learned else None
            source = recipe.reward.source
            scoring = Scoring(
                recipe.evaluate.sampling,
                reward_model,
                None if learned else source,
                source if learned else None,
            )
            if reward_model is not None:
                needed[REWARD.name] = reward_model
        if scoring is None or reward_model is not None:
            needed |= {SAMPLE.name: prepared.sampled} if prepared.sampled else {}
        training = Training(
            policy,
            self._model(policy.start, node.seed),
            self._model(policy.reference, node.seed),
            prepared.judged if scoring else prepared.pairs,
            recipe.tokens,
            node.seed,
            logps,
            scoring,
        )
        labelled = self.context.labelled(node.label)
        manifest = self.keep(train_policy(labelled, training))
        return TrainedPolicy(node, manifest, needed, scoring.reward_model if scoring else None)

    def _model(self, name: str, seed: int) -> Manifest:
        if name == REFERENCE:
            return self.prepared.reference
        return self.prepared.models[name] if is_external(name) else self.earlier[name, seed].manifest

    def _needed(self, node: PlannedPolicy) -> dict[str, Manifest]:
        """The artifacts of the policies that this node needs, and those that these needed."""
        needed: dict[str, Manifest] = {}
        for key in node.needs:
            other = self.earlier[key]
            needed |= other.needed | {other.node.config.entry.stage + other.node.label: other.manifest}
        return needed

    def _logps(self, node: PlannedPolicy) -> Manifest:
        prepared, policy, label = self.prepared, node.config, self.labels[node.label]
        reference = self._model(policy.reference, node.seed)
        result = cache_reference(
            self.context.labelled(label),
            reference,
            prepared.pairs,
            policy,
            prepared.recipe.tokens,
            prepared.recipe.cache.token_budget,
            node.seed,
        )
        return self.keep(result)
