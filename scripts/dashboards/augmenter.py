"""The dashboard for operators of the augmenter: throughput, backlog, and what was rejected."""

from scripts.dashboards.expressions import increase, quantiles, rate, select, share
from scripts.dashboards.panels import BAD, GOOD, WARN, Dashboard, Query, Row, Series, Stat

_FILES = "augmenter_files_total"
_LINES = "augmenter_lines_total"
_NOT_BLANK = 'outcome=~"augmented|rejected"'

_HEADLINES = (
    Stat(
        title="Files done",
        description="Files whose output was completed in the time shown.",
        queries=[Query(expr=increase(_FILES, 'outcome="done"'))],
        decimals=0,
    ),
    Stat(
        title="Files failed",
        description="Tries that failed in the time shown; --watch and the queue try a file again.",
        queries=[Query(expr=increase(_FILES, 'outcome="failed"'))],
        steps=[(None, GOOD), (1, BAD)],
        decimals=0,
    ),
    Stat(
        title="Lines augmented",
        description="Lines that were given a level in the time shown.",
        queries=[Query(expr=increase(_LINES, 'outcome="augmented"'))],
        decimals=0,
    ),
    Stat(
        title="Rejected",
        description="Share of the lines (blank ones aside) that could not be augmented. They are in "
        "_rejects/, with the reasons.",
        queries=[Query(expr=share(increase(_LINES, 'outcome="rejected"'), increase(_LINES, _NOT_BLANK)))],
        unit="percentunit",
        steps=[(None, GOOD), (0.001, WARN), (0.01, BAD)],
        decimals=2,
    ),
    Stat(
        title="Backlog",
        description="Files found and not yet ended, all processes together. With a queue: 0, its own depth "
        "tells.",
        queries=[Query(expr=f"sum({select('augmenter_backlog_files')})")],
        steps=[(None, GOOD), (30, WARN), (60, BAD)],
    ),
    Stat(
        title="Processes",
        description="Augmenters that Prometheus sees.",
        queries=[Query(expr=f"count({select('augmenter_build_info')})")],
        steps=[(None, BAD), (1, GOOD)],
    ),
)

_WORK = (
    Series(
        title="Lines by outcome",
        description="Lines of files that are done.",
        queries=[Query(expr=rate(_LINES, by="outcome"), legend="{{outcome}}")],
        unit="cps",
        stacked=True,
    ),
    Series(
        title="Files by outcome",
        description="skipped: the output was there already, or the object is archived or gone. A file a "
        "minute comes in.",
        queries=[Query(expr=f"60 * {rate(_FILES, by='outcome')}", legend="{{outcome}}")],
        unit="cpm",
        stacked=True,
    ),
    Series(
        title="Backlog by process",
        description="Files found and not yet ended. It grows: pairs are new and wait for the model, or the "
        "processes are too few.",
        queries=[
            Query(expr=f"sum by (instance) ({select('augmenter_backlog_files')})", legend="{{instance}}")
        ],
        steps=[(None, GOOD), (60, BAD)],
        stacked=True,
    ),
    Series(
        title="Rejected lines",
        description="Share of the lines, blank ones aside.",
        queries=[
            Query(expr=share(rate(_LINES, 'outcome="rejected"'), rate(_LINES, _NOT_BLANK)), legend="rejected")
        ],
        unit="percentunit",
        steps=[(None, GOOD), (0.01, BAD)],
    ),
    Series(
        title="File duration",
        description="From the first look at a file to its end.",
        queries=quantiles("augmenter_file_duration_seconds"),
        unit="s",
    ),
    Series(
        title="Processes by version",
        description="Two versions for longer than a rollout takes: it is stuck.",
        queries=[Query(expr=f"count by (version) ({select('augmenter_build_info')})", legend="{{version}}")],
    ),
)

_OBJECTS = (
    Series(
        title="Messages by outcome",
        description="Messages of the queue. outside and not_understood are left in it: another producer "
        "writes to this queue.",
        queries=[
            Query(expr=f"60 * {rate('augmenter_queue_messages_total', by='outcome')}", legend="{{outcome}}")
        ],
        unit="cpm",
        stacked=True,
    ),
    Series(
        title="Archived objects",
        description="Files skipped because their object is in cold storage and not restored.",
        queries=[Query(expr=f"60 * {rate('augmenter_archived_files_total')}", legend="archived")],
        unit="cpm",
    ),
    Series(
        title="Existing levels",
        description="Lines that had a level before. replaced: by the model's; kept: --keep-existing left it.",
        queries=[Query(expr=rate("augmenter_existing_levels_total", by="outcome"), legend="{{outcome}}")],
        unit="cps",
    ),
)

_PROXY = (
    Series(
        title="RPC duration",
        description="What the proxy took, however it ended. At --deadline (120 s) an RPC is given up and "
        "tried again.",
        queries=quantiles("augmenter_rpc_duration_seconds"),
        unit="s",
        steps=[(None, GOOD), (120, BAD)],
        width=12,
    ),
    Series(
        title="RPCs",
        description="RPCs a second, each of up to --batch-size pairs.",
        queries=[
            Query(expr=rate("augmenter_rpc_duration_seconds_count", by="instance"), legend="{{instance}}")
        ],
        unit="reqps",
        width=12,
    ),
)

DASHBOARD = Dashboard(
    title="Seniority cache: augmenter",
    description="Files, lines and RPCs of the augmenter, all processes together.",
    discovery_metric="augmenter_build_info",
    rows=[
        Row(title="Now", panels=_HEADLINES),
        Row(title="Files and lines", panels=_WORK),
        Row(title="Queue, cold storage and existing levels", panels=_OBJECTS),
        Row(title="The proxy, as it is seen from here", panels=_PROXY),
    ],
)
