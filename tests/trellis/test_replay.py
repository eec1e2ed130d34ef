"""What is recorded gives what the function gives, whoever calls it; what is not recorded is called."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from viewmesh.trellis.replay import Graph, Recorded, _shapes


def test_what_was_not_recorded_is_called():
    calls = []

    def function(*given, **chosen):
        calls.append(chosen)
        return given[0] + 1

    recorded = Recorded(function)
    assert recorded(torch.zeros(2)).tolist() == [1, 1]
    recorded.graphs[_shapes((torch.zeros(2),), {"guided": True})] = Graph(None, (), torch.zeros(2))  # pyright: ignore[reportArgumentType]
    assert recorded(torch.zeros(2), guided=False).tolist() == [1, 1]
    assert recorded(torch.zeros(3), guided=True).tolist() == [1, 1, 1]
    assert recorded(torch.zeros(2).double(), guided=True).tolist() == [1, 1]
    assert recorded(torch.zeros(2), torch.zeros(1), guided=True).tolist() == [1, 1]
    assert calls == [{}, {"guided": False}, {"guided": True}, {"guided": True}, {"guided": True}]


def test_it_does_not_keep_the_object_that_holds_it():
    class Network:
        def __init__(self) -> None:
            self.recorded = Recorded(self.forward)

        def forward(self, x):
            return x + 1

    network = Network()
    assert network.recorded(torch.zeros(1)).tolist() == [1]
    seen = weakref.ref(network)
    gc.disable()
    try:
        del network
        assert seen() is None
    finally:
        gc.enable()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).cuda().eval()


@pytest.mark.gpu
def test_a_replay_gives_what_the_function_gives_and_leaves_earlier_results_alone(network):
    recorded = Recorded(lambda x, *, twice: network(network(x)) if twice else network(x))
    for n in (4, 7):
        for twice in (True, False):
            recorded.record(torch.zeros(n, 64).cuda(), twice=twice)
    function, recorded._function = recorded.function, lambda: None  # nothing is left to be called
    given = [(torch.randn(n, 64).cuda(), twice) for n in (4, 7, 4) for twice in (True, False)]
    with torch.no_grad():
        found = [recorded(x, twice=twice) for x, twice in given]
        torch.testing.assert_close(found, [function(x, twice=twice) for x, twice in given])


@pytest.mark.gpu
def test_threads_on_streams_of_their_own_get_their_own_results(network):
    recorded = Recorded(network)
    recorded.record(torch.zeros(2048, 64).cuda())

    def many(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        stream, apart = torch.cuda.Stream(), []
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(50):
                x = torch.randn(2048, 64, device="cuda", generator=generator)
                apart.append((recorded(x) - network(x)).abs().max())
            stream.synchronize()
        return float(torch.stack(apart).max())

    with ThreadPoolExecutor(6) as pool:
        assert max(pool.map(many, range(6))) < 1e-5


@pytest.mark.gpu
def test_others_use_the_device_while_it_records(network):
    recorded, going = Recorded(network), True

    def work():
        rounds = 0
        with torch.no_grad():
            while going:
                torch.cuda.empty_cache()
                network(torch.randn(512 + rounds % 100, 64).cuda()).sum().item()
                rounds += 1
        return rounds

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(work) for _ in range(2)]
        try:
            for n in range(1, 40):
                recorded.record(torch.zeros(n, 64).cuda())
        finally:
            going = False
        assert all(other.result() > 0 for other in others)
    x = torch.randn(39, 64).cuda()
    with torch.no_grad():
        torch.testing.assert_close(recorded(x), network(x))
