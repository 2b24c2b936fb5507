-- Change the state columns of one row if one of the guards matches whole.
--
-- KEYS[1]  the session's hash
-- ARGV[1]  JSON: {instance, incarnation, [guards], changes}; guards and changes are
--          [[column, value], ...]; a changed value '+<ms>' is the storage's time plus that

local write = cjson.decode(ARGV[1])
local field = 'i:' .. write[1]
local row = redis.call('HGET', KEYS[1], field)
local incarnation = string.match(redis.call('HGET', KEYS[1], 'v') or '', '^(.-) ')
if not row or incarnation ~= write[2] then return {0, false} end

local newline = string.find(row, '\n', 1, true)
local columns = {}
for column in string.gmatch(string.sub(row, 1, newline - 1) .. '|', '([^|]*)|') do
  columns[#columns + 1] = column
end

local function matches(guard)
  for _, pair in ipairs(guard) do
    if columns[pair[1]] ~= pair[2] then return false end
  end
  return true
end

local matched = false
for _, guard in ipairs(write[3]) do matched = matched or matches(guard) end
if not matched then return {0, row} end

for _, pair in ipairs(write[4]) do
  local value = pair[2]
  if string.sub(value, 1, 1) == '+' then
    value = string.format('%d', now_ms() + tonumber(string.sub(value, 2)))
  end
  columns[pair[1]] = value
end
columns[1] = string.format('%d', tonumber(columns[1]) + 1)
row = table.concat(columns, '|') .. string.sub(row, newline)
redis.call('HSET', KEYS[1], field, row)
return {1, row}
