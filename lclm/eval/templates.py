"""The report's two pages as Jinja templates; `report.py` fills both with the same facts."""

# ruff: noqa: E501

MARKDOWN = """\
# {{ title }}

{{ status }}

{% for line in notes -%}
- {{ line }}
{% endfor %}
## Is the memory used?

{% if rows -%}
Probes on held-out data at step {{ probe_step }}. Intervals: 95%, over held-out documents.

| ratio | figure | on | value | 95% interval | aim | verdict | beside |
|---|---|---|---|---|---|---|---|
{% for row in rows -%}
| {{ row.ratio }}x | {{ row.figure }} | {{ row.where }} | {{ row.value }} | {{ row.interval }} | {{ row.aim }} \
| **{{ row.status }}** | {{ row.better }} |
{% endfor %}
{% else -%}
No probe has run yet.

{% endif -%}
{% for reason in probe_absent -%}
- Not measured: {{ reason }}
{% endfor %}
{% for plot in plots if plot.section == "memory" -%}
![{{ plot.name }}]({{ folder }}/{{ plot.name }}.svg)

{{ plot.caption }}

{% endfor -%}
## Samples
{% if not samples %}
None were generated.
{% endif -%}
{% for sample in samples %}
**{{ sample.title }}**

{% for name, text in sample.parts -%}
{{ name }}:

{{ text | block }}

{% endfor -%}
{% endfor %}
## Training

{% for plot in plots if plot.section == "training" -%}
![{{ plot.name }}]({{ folder }}/{{ plot.name }}.svg)

{{ plot.caption }}

{% endfor -%}
## Stages

| {{ stage_head | cells }} |
|{% for _ in stage_head %}---|{% endfor %}
{% for row in stages -%}
| {{ row | cells }} |
{% endfor %}
## Data

{% if datasets -%}
| {{ data_head | cells }} |
|{% for _ in data_head %}---|{% endfor %}
{% for row in datasets -%}
| {{ row | cells }} |
{% endfor %}
{% else -%}
No manifest could be read.

{% endif -%}
## Provenance

{% for name, value in provenance -%}
- {{ name }}: {{ value }}
{% else -%}
None was found.
{% endfor %}
{% if absent -%}
## Absent from this run folder

{% for what in absent -%}
- {{ what }}
{% endfor -%}
{% endif -%}
"""

HTML = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1000px;
       margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
th { color: #666; font-weight: 600; } td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; } .met { color: #00714f; font-weight: 600; } .part { color: #9a6700; font-weight: 600; }
.missed { color: #b3261e; font-weight: 600; } .quiet { color: #666; }
figure { margin: 1.4rem 0; } figure img { width: 100%; height: auto; } figcaption { color: #666; font-size: .88rem; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; font-size: .8rem; margin: .2rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: .8rem; }
.pair > div { min-width: 0; } .wrong { background: #f9d3cf; }
</style></head><body>
{%- macro table(head, rows) %}
<div class="wide"><table><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>
{%- for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</table></div>
{%- endmacro %}
{%- macro figures(section) %}
{%- for plot in plots if plot.section == section %}
<figure><figcaption>{{ plot.caption }}</figcaption>
<img alt="{{ plot.caption }}" src="data:image/svg+xml;base64,{{ plot.svg | base64 }}"></figure>
{%- endfor %}
{%- endmacro %}
<h1>{{ title }}</h1>
<p>{{ status }}</p>
<ul>{% for line in notes %}<li>{{ line }}</li>{% endfor %}</ul>
<h2>Is the memory used?</h2>
{%- if rows %}
<p class="quiet">Probes on held-out data at step {{ probe_step }}. Intervals: 95%, over held-out documents.</p>
<div class="wide"><table>
<tr><th>ratio</th><th>figure</th><th>on</th><th>value</th><th>95% interval</th><th>aim</th><th>verdict</th>
<th>beside</th></tr>
{%- for row in rows %}
<tr><td>{{ row.ratio }}x</td><td>{{ row.figure }}</td><td>{{ row.where }}</td><td class="number">{{ row.value }}</td>
<td class="number">{{ row.interval }}</td><td>{{ row.aim }}</td><td class="{{ row.mark }}">{{ row.status }}</td>
<td class="quiet">{{ row.better }}</td></tr>
{%- endfor %}
</table></div>
{%- else %}
<p>No probe has run yet.</p>
{%- endif %}
{%- if probe_absent %}
<ul class="quiet">{% for reason in probe_absent %}<li>Not measured: {{ reason }}</li>{% endfor %}</ul>
{%- endif %}
{{ figures("memory") }}
<h2>Samples</h2>
{%- if samples %}
<p class="quiet">Generated greedily at step {{ probe_step }} from held-out text that the decoder read only as latents.
Marked: characters unlike the truth's.</p>
{%- else %}
<p>None were generated.</p>
{%- endif %}
{%- for sample in samples %}
<p><b>{{ sample.title }}</b></p>
<div class="pair">
{%- for name, text in sample.parts %}
<div><span class="quiet">{{ name }}</span><pre>
{%- if name == "written" %}{{ text | compare(sample.truth) }}{% else %}{{ text }}{% endif %}</pre></div>
{%- endfor %}
</div>
{%- endfor %}
<h2>Training</h2>
{{ figures("training") }}
<h2>Stages</h2>
{{ table(stage_head, stages) }}
<h2>Data</h2>
{%- if datasets %}{{ table(data_head, datasets) }}{% else %}<p>No manifest could be read.</p>{% endif %}
<h2>Provenance</h2>
{%- if provenance %}{{ table(["what", "value"], provenance) }}{% else %}<p>None was found.</p>{% endif %}
{%- if absent %}
<h2>Absent from this run folder</h2>
<ul>{% for what in absent %}<li>{{ what }}</li>{% endfor %}</ul>
{%- endif %}
</body></html>
"""
