from tests.unit.learner.conftest import tiny

__all__ = ["tiny"]
