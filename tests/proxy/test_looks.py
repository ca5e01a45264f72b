"""What a gateway looks at again and again goes on after a fault."""

from tests.proxy.test_gateway import Setup, run, until


def test_a_fault_of_ours_does_not_end_the_looks_at_the_instances(monkeypatch):
    async def test():
        async with Setup() as setup:
            faults = []

            def broken(*_):
                faults.append(1)
                raise RuntimeError("a fault")

            monkeypatch.setattr(setup.gateway._outbox, "flush", broken)
            monkeypatch.setattr(setup.gateway.meter, "tend", broken)
            await until(lambda: len(faults) >= 4)
            setup.instance()
            await until(setup.gateway.instances)
            monkeypatch.undo()

    run(test())
