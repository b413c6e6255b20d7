"""kill -9 at random moments of training: the run resumed ends as the one that nothing stopped."""

import random

KILLS_OF_A_RUN = 5


def steps(run_dir):
    """The steps of the complete checkpoints, and the names of what is half-written or deleted."""
    names = [path.name for path in (run_dir / "checkpoints").glob("*")]
    return [int(n) for n in names if n.isdigit()], [n for n in names if not n.isdigit()]


def moments(seed, whole):
    """Yields in which save and at which of its file operations to die, or when; at random."""
    rng = random.Random(seed)
    operations = whole["operations"]["save"]
    yield ["half", 2, 1]
    while True:
        yield ["time", rng.uniform(0, whole["seconds"] / 2)]  # which has compilation in it
        yield ["open", 1, rng.randint(1, 10)]
        save = rng.randint(1, 3)
        yield ["save", save, rng.randint(1, operations[save - 1])]


def test_killed_runs_end_as_the_run_nothing_stopped(lives, whole, kills):
    deaths, half_written, moment = [], 0, moments(0, whole)
    for number in range(2 * kills):  # runs; one may end before the moment comes
        name = f"killed{number}"
        latest = 0
        for _ in range(min(KILLS_OF_A_RUN, kills - len(deaths))):
            how = next(moment)
            outcome = lives(run=name, die=how)
            if outcome != {"killed": -9}:
                break
            deaths.append(how[0])
            complete, incomplete = steps(lives.folder / name)
            half_written += len(incomplete)
            assert max(complete, default=0) >= latest, (how, complete)
            latest = max(complete, default=0)
        else:
            outcome = lives(run=name)
        for key in ("params", "best", "records"):
            assert outcome.get(key) == whole[key], (key, deaths, outcome, lives.log())
        assert steps(lives.folder / name)[1] == [], "what was half-written is cleared away"
        if len(deaths) == kills:
            break
    print(f"{deaths} in {number + 1} runs; {half_written} times something was half-written")
    assert len(deaths) == kills
    assert half_written >= 1, "no kill came in a save: this test shows less than it should"
