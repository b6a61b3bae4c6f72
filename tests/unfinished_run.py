"""Runs that end in their midst, for tests of what goes on from there."""
import contextlib

import pytest

import image_text_sim_clip as script


@contextlib.contextmanager
def ends_at_third_part():
    """In this context a run of this process ends as by SIGTERM before its third part; gives the list of its commits."""
    commit = script.commit_part
    commits = []

    def commit_or_end(*values):
        commits.append(1)
        if len(commits) > 2:
            raise script.Interrupted(15)
        return commit(*values)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(script.Interrupted):
        patch.setattr(script, "commit_part", commit_or_end)
        yield commits
