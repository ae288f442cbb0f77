"""Digests that are computed while the caller goes on."""

import copy
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import certificates, tree
from jaxunlearn.certificates import deferred, verify

PROMISE = {
    "method": "replay",
    "paper": "Cao & Yang 2015",
    "target": "counterfactual",
    "guarantee": "exact",
    "scope": "full-state",
    "why_no_epsilon": certificates.WHY_EXACT,
    "not_covered": ("Copies of the parameters made before.",),
}


@pytest.fixture
def gate(monkeypatch):
    """No digest is computed until the gate opens."""
    opened, real = threading.Event(), tree.digest

    def late(leaves):
        assert opened.wait(30)
        return real(leaves)

    monkeypatch.setattr(tree, "digest", late)
    yield opened
    opened.set()


def issued():
    """A certificate and its salt, all that it speaks of, and copies of that."""
    before = {"w": np.arange(5.0)}, {"mu": jnp.arange(3, dtype=jnp.bfloat16)}
    after = {"w": jnp.arange(4.0) + 1}, {"key": jax.random.key(3), "count": jnp.int32(7)}
    kept = copy.deepcopy(before), tree.copy(after)
    certificate, salt = certificates.issue([3, 5], 0, before, after, **PROMISE)
    return certificate, salt, (before, after), kept


def test_digests_are_of_what_was_issued_whatever_becomes_of_it(gate):
    certificate, salt, (before, after), kept = issued()
    before[0]["w"][:] = -1.0
    donated = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 0, x), donate_argnums=0)
    jax.block_until_ready(donated((after[0], before[1])))
    gate.set()
    names = ("params_before", "state_before", "params_after", "state_after")
    trees = dict(zip(names, (*kept[0], *kept[1]), strict=True))
    checked = verify(certificate, **trees, salt=salt)
    assert [c.outcome for c in checked.checks if c.name in names] == ["ok"] * 4
    changed = trees | {"params_before": before[0]}
    assert not verify(certificate, **changed, salt=salt).ok


def test_what_reads_a_certificate_waits_for_its_digests(gate):
    certificate, *_ = issued()
    read = []
    reader = threading.Thread(target=lambda: read.append(certificate.to_json()))
    reader.start()
    reader.join(0.05)
    assert not read
    gate.set()
    reader.join(30)
    assert certificates.Certificate.from_json(read[0]) == certificate
    assert copy.deepcopy(certificate) == certificate
    assert certificate.params_after in repr(certificate)


def test_a_second_certificate_waits_for_the_digests_of_the_first(gate):
    issued()
    done = []
    second = threading.Thread(target=lambda: done.append(issued()))
    second.start()
    second.join(0.05)
    assert not done
    gate.set()
    second.join(30)
    assert done


def test_an_error_met_on_the_way_is_raised_to_who_reads_and_spoils_no_later_certificate(
    monkeypatch,
):
    real = tree.digest
    monkeypatch.setattr(tree, "digest", lambda leaves: 1 / 0)
    certificate, *_ = issued()
    deferred.wait(deferred._running)
    monkeypatch.setattr(tree, "digest", real)
    for read in (lambda: certificate.params_after, certificate.to_json, certificate.summary):
        with pytest.raises(ZeroDivisionError):
            read()
    assert issued()[0].params_after.startswith("sha256:")


def test_views_on_the_host_are_not_copies_of_what_jax_keeps_there():
    array = jax.device_put(jnp.arange(8.0), jax.devices("cpu")[0])
    assert tree.on_host(array).ctypes.data == array.unsafe_buffer_pointer()
    mine = np.arange(3.0)
    assert not np.shares_memory(tree.on_host(mine), mine)
