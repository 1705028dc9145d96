"""What runs came to, as tables and figures on one page."""

from stochastic_depth.extras import require

for _module in ("altair", "jinja2", "vl_convert"):
    require(_module, "report")
