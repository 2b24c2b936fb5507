-- Remove a session with its due dates.
--
-- KEYS[1]  the session's hash; KEYS[2] its waiting instances; KEYS[3] the due dates
-- KEYS[4]  the gates that wait
-- ARGV[1]  the version that it must still have, or ''
-- ARGV[2]  <uid length>:<uid>

-- As _escape in redis.py has it.
local function unescaped(text)
  return (string.gsub(text, '%%(%x%x)', function(code) return string.char(tonumber(code, 16)) end))
end

local version = string.match(redis.call('HGET', KEYS[1], 'v') or '', ' (.*)$') or ''
if ARGV[1] ~= '' and ARGV[1] ~= version then return 0 end
set_due(KEYS[3], ARGV[2], '', 0)
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  local kind, name = string.sub(field, 1, 2), string.sub(field, 3)
  if kind == 'i:' then
    set_due(KEYS[3], ARGV[2], name, 0)
    local state = string.match(redis.call('HGET', KEYS[1], field), '^[^\n]*')
    redis.call('HDEL', KEYS[4], unescaped(string.match(state, '|([^|]*)$')))
  end
  -- As celery_triggers.engine.names.delayed_name has it.
  if kind == 'd:' then set_due(KEYS[3], ARGV[2], name .. '~', 0) end
end
redis.call('DEL', KEYS[2])
return redis.call('DEL', KEYS[1])
