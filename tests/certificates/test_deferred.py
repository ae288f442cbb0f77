"""Digests that are computed while the caller goes on."""

import copy
import dataclasses
import os
import subprocess
import sys
import threading
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import certificates, errors, tree
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


def test_what_arrives_and_is_no_digest_is_refused(gate):
    gate.set()
    certificate, *_ = issued()
    fields = {f.name: getattr(certificate, f.name) for f in dataclasses.fields(certificate)}
    future = Future()
    future.set_result("garbage")
    changed = certificates.Certificate(**(fields | {"params_after": future}))
    for read in (lambda: changed.params_after, changed.to_json):
        with pytest.raises(errors.CertificateError, match="params_after as sha256"):
            read()


FORKED = """
import atexit, os, signal, threading
from jaxunlearn import errors
from jaxunlearn.certificates.deferred import Deferred, deferred

class Holder:
    value = Deferred()

def held(function):
    holder = Holder()
    holder.value = deferred(value=function)["value"]
    return holder

def now():
    return "sha256:" + 64 * "0"

def in_child(function):
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(function())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def reads_fresh():
    return 0 if held(now).value == now() else 1

def reads_lost():
    try:
        pending.value
    except errors.CertificateError:
        return 0 if read.value == now() and reads_fresh() == 0 else 2
    return 1

read = held(now)
read.value
print("fresh", in_child(reads_fresh), flush=True)
gate = threading.Event()
pending = held(lambda: gate.wait(30) and now())
print("pending", in_child(reads_lost), flush=True)
gate.set()
print("parent", pending.value == now(), flush=True)
atexit.register(lambda: print("exit", held(now).value == now(), flush=True))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_waits_for_nothing_and_digests_are_still_computed_at_exit():
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=120
    )
    assert ran.stdout.split("\n")[:-1] == ["fresh 0", "pending 0", "parent True", "exit True"], ran


def test_views_on_the_host_are_not_copies_of_what_jax_keeps_there():
    array = jax.device_put(jnp.arange(8.0), jax.devices("cpu")[0])
    assert tree.on_host(array).ctypes.data == array.unsafe_buffer_pointer()
    mine = np.arange(3.0)
    assert not np.shares_memory(tree.on_host(mine), mine)
