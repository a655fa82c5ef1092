"""Many pictures in one run: what is done with a folder, a pattern, and helpers beside this process."""
import bgoptimizer
from runner import quick
from scenes import sloping_sky


# ----------------------------------------------------------------------------------- one training step

def traces(monkeypatch):
    """The list that grows by one whenever a step is traced."""
    bgoptimizer._training.cache_clear()
    found = []
    step = bgoptimizer._Training._step

    def traced(self, lesson):
        found.append(self.kind)
        return step(self, lesson)

    monkeypatch.setattr(bgoptimizer._Training, "_step", traced)
    return found


def test_the_training_step_is_traced_once_for_pictures_of_one_shape(monkeypatch):
    found = traces(monkeypatch)
    for seed in range(3):
        image, _ = sloping_sky(seed=seed)
        image[:seed] = 0  # missing rows: the fit sees fewer pixels
        bgoptimizer.optimize(image, quick(epochs=3))
    assert len(found) == 1
    image, _ = sloping_sky(channels=1)
    bgoptimizer.optimize(image, quick(epochs=3))
    assert len(found) == 2


def test_a_step_that_is_used_again_has_forgotten_the_picture_before():
    first, _ = sloping_sky()
    second, _ = sloping_sky(seed=2, noise=0.002)
    bgoptimizer._training.cache_clear()
    alone = bgoptimizer.optimize(second, quick(epochs=30))
    bgoptimizer._training.cache_clear()
    bgoptimizer.optimize(first, quick(epochs=40, learning_rate=0.01))
    after_another = bgoptimizer.optimize(second, quick(epochs=30))
    assert (alone.model == after_another.model).all()
    assert (alone.fit.history == after_another.fit.history).all()
