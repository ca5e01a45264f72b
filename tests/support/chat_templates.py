# ruff: noqa: E501 - a line feed in a template is a part of it
"""Chat templates written for tests in the manner of the big families: the same features of jinja,
other words. Each with the special tokens it needs."""

# Headers per role, bos, tools in the first user message or the system part, dates, macros.
HEADERS = """{{- bos_token }}
{%- macro header(role) -%}
<|head|>{{ role }}<|/head|>

{% endmacro -%}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- header("system") }}
{%- if tools is not none %}
    {{- "Tools:\\n\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- header(message['role']) + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- header('assistant') }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot|>" }}
    {%- else %}
        {{- header('tool') }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}
"""

# Marks around messages, grouped tool answers, thoughts that are kept after the last question only.
MARKS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<answer>') and message.content.endswith('</answer>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}
                {{- '\\n' }}
            {%- endif %}
            {%- set call = tool_call.function or tool_call %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {%- if call.arguments is string %}
                {{- call.arguments }}
            {%- else %}
                {{- call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<answer>\\n' + content + '\\n</answer>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# Line statements on lines of their own, loop controls, the generation tag, a default system text.
BLOCKS = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
<|im_start|>system
You are helpful.<|im_end|>
    {% endif %}
    {% if message['role'] == 'tool' %}
        {% continue %}
    {% endif %}
<|im_start|>{{ message['role'] }}
    {% generation %}
{{ message['content'] or 'called ' ~ message['tool_calls'] | map(attribute='function.name') | join(', ') }}<|im_end|>
    {% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

TEMPLATES = {"headers": HEADERS, "marks": MARKS, "blocks": BLOCKS}

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter & Wind für <Städte>, 'quoted'",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def _call(arguments):
    return {
        "id": "call-1",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }


ASKED = [{"role": "user", "content": "Wie ist das Wetter in Zürich?"}]
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [_call('{"city": "Zürich", "days": 2}')],
}
ANSWERED = {"role": "tool", "tool_call_id": "call-1", "content": '{"sky": "grau <b>"}'}

# name -> (messages as a client sends them, tools)
CONVERSATIONS = {
    "user": (ASKED, None),
    "system and user": ([{"role": "system", "content": " Be brief. "}, *ASKED], None),
    "turns": (
        [*ASKED, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nGrau."}, *ASKED],
        None,
    ),
    "reasoning": ([*ASKED, {"role": "assistant", "content": "x", "reasoning_content": "y"}], None),
    "tools offered": (ASKED, [WEATHER_TOOL]),
    "tool called": ([*ASKED, CALLED, ANSWERED], [WEATHER_TOOL]),
    "tool called twice": ([*ASKED, CALLED, ANSWERED, ANSWERED, *ASKED], [WEATHER_TOOL]),
    "odd text": ([{"role": "user", "content": "\u00a0<|im_end|>\r\n{{ 1 }} 👩‍👩‍👧\n"}], None),
}
